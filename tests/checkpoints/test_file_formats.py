"""Contents tell the format of a file, whatever its name; files of other kinds are named."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from wrapped import assert_equal, plain

from lora_sr.checkpoints import load_network
from lora_sr.cli.main import main


@pytest.mark.parametrize(
    'name', ['net.pth', 'NET.SAFETENSORS', 'net', 'net.ckpt', b'caf\xe9.pth', b'caf\xe9.safetensors']
)
@pytest.mark.parametrize('kind', ['torch', 'safetensors', 'old'])
def test_contents_tell_the_format_and_not_names(tmp_path, name, kind):
    file = os.path.join(tmp_path, os.fsdecode(name))
    if kind == 'safetensors':
        save_file(plain(), tmp_path / 'written')
    else:
        torch.save(plain(), tmp_path / 'written', _use_new_zipfile_serialization=kind == 'torch')
    try:
        shutil.move(tmp_path / 'written', file)
    except OSError:
        pytest.skip('the file system takes no such names')
    assert_equal(load_network(file).state_dict())


@pytest.mark.parametrize(
    'beginning, kind',
    [
        (b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
        (b'GGUF\x03\0\0\0', 'a GGUF file'),
        (b'7767517\n3 3\n', 'the text of an ncnn network'),
        (b'\x89PNG\r\n\x1a\n', 'a PNG image'),
    ],
)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_files_of_other_kinds_are_named(tmp_path, capsys, beginning, kind, suffix):
    (tmp_path / f'net{suffix}').write_bytes(beginning + bytes(100))
    assert main(['inspect', str(tmp_path / f'net{suffix}')]) == 2
    assert f'must be in the format of torch or of safetensors, got {kind}' in capsys.readouterr().err


def test_an_exported_onnx_is_named(tmp_path, capsys):
    pytest.importorskip('onnx')
    torch.save(plain(), tmp_path / 'net.pth')
    assert main(['export', 'onnx', str(tmp_path / 'net.pth'), '-o', str(tmp_path / 'net.onnx')]) == 0
    shutil.copy(tmp_path / 'net.onnx', tmp_path / 'renamed.pth')
    for name in ('net.onnx', 'renamed.pth'):
        assert main(['inspect', str(tmp_path / name)]) == 2
        assert 'got an ONNX model' in capsys.readouterr().err
