"""The folder of an adaptation, which several files of tests report on."""

import pytest
from tiny_adaptation import write_adaptation


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
    return write_adaptation(tmp_path_factory.mktemp('adapted') / 'phone')
