"""What the tests of image files share."""

import pytest

from lora_sr.images.formats import Picture, read_picture


@pytest.fixture
def read(tmp_path):
    def read(data: bytes) -> Picture:
        (tmp_path / 'image').write_bytes(data)
        return read_picture(tmp_path / 'image')

    return read
