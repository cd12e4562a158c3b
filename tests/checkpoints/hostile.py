"""What the tests of damaged and hostile files share."""

import zipfile

import torch

from lora_sr.archs import SPAN
from lora_sr.cli.main import main

KEY = 'conv_cat.weight'


def span() -> SPAN:
    torch.manual_seed(0)
    return SPAN(feature_channels=4, upscale=2, deploy=True)


def assert_refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('lora-sr: error: ') and error.count('\n') == 1 and error[:-1].isprintable()
    return error


def archive(file, pickled: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """Write an archive as torch does, with a pickle of one's own."""
    with zipfile.ZipFile(file, 'w', compression) as members_of:
        for name, data in {'data.pkl': pickled, 'byteorder': b'little', 'version': b'3\n', **members}.items():
            members_of.writestr(f'a/{name}', data)
