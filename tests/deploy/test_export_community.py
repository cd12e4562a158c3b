"""Exports of networks of spandrel: the files give their images, or a sentence says for which images they would."""

import pytest
import torch
from community_networks import SMALL

from lora_sr.deploy.exports import export_chainner, export_onnx, export_torchscript
from lora_sr.deploy.exports.deployed import exporter_reason
from lora_sr.errors import InputError

pytest.importorskip('onnxruntime')
EXPORTS = {'.onnx': export_onnx, '.pt': export_torchscript, '.pth': export_chainner}


@pytest.fixture
def export(tmp_path, capfd):
    """A function: export a small network, and see that nothing is shown meanwhile."""

    def export(name, suffix):
        torch.save(SMALL[name].state(), tmp_path / 'net.pth')
        try:
            return EXPORTS[suffix](tmp_path / 'net.pth', tmp_path / f'exported{suffix}')
        finally:
            assert capfd.readouterr() == ('', '')

    return export


@pytest.mark.parametrize('suffix', EXPORTS)
@pytest.mark.parametrize('name', ['DnCNN', 'ESRGAN-x2', 'PLKSR', 'RCAN'])
def test_files_give_the_images(export, name, suffix):
    assert export(name, suffix).difference.largest <= 1e-4


# Whose call takes something before or behind the network; whose file has other names; whose output is random.
@pytest.mark.parametrize('name', ['DRUNet', 'FDnCNN', 'MixDehazeNet', 'SwinIR-unshuffle', 'AuraSR', 'SeemoRe'])
def test_chainner_is_given_what_spandrel_runs(export, name):
    assert export(name, '.pth').difference.largest <= 1e-4


@pytest.mark.parametrize(
    ('name', 'suffix', 'message'),
    [
        ('HAT', '.onnx', 'as ONNX: what torch traces of its HAT is right for one image at a time alone.'),
        ('HAT', '.pt', 'as TorchScript: what torch traces of its HAT is right for one image at a time alone.'),
        ('DRUNet', '.onnx', 'of its DRUNet is right for one image at a time alone.'),
        ('DITN', '.pt', 'of its DITN is right for one size alone, of which it makes constants.'),
        ('SAFMN', '.onnx', 'as ONNX: SAFMN: Unsupported: ONNX export of operator adaptive pooling'),
        ('FFTformer', '.onnx', "as ONNX: FFTformer: Exporting the operator 'aten::fft_rfft2' to ONNX"),
        ('NAFNet', '.pt', 'as TorchScript: NAFNet: its LayerNormFunction is Python code, which no file can hold.'),
        ('OmniSR', '.pt', 'as TorchScript: OmniSR: its LayerNormFunction is Python code, which no file can hold.'),
        ('GRL', '.onnx', 'as ONNX: torch ends the process when it traces a GRL.'),
        ('GRL', '.pt', 'as TorchScript: torch ends the process when it traces a GRL.'),
    ],
)
def test_a_refusal_says_why(export, tmp_path, name, suffix, message):
    with pytest.raises(InputError) as caught:
        export(name, suffix)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / f'exported{suffix}').exists()


def test_onnxruntime_shows_nothing_of_what_it_refuses(tmp_path, capfd):
    """Layers of no channels, as of an RGT that is too narrow, which it checks while it runs."""
    small = SMALL['RGT']
    narrow = type(small)(small.architecture, small.kind, {**small.arguments, 'embed_dim': 12})
    torch.save(narrow.state(), tmp_path / 'net.pth')
    with pytest.raises(InputError, match='as ONNX: onnxruntime does not run it: '):
        export_onnx(tmp_path / 'net.pth', tmp_path / 'exported.onnx')
    assert capfd.readouterr() == ('', '')


def test_a_stack_is_no_reason():
    stack = 'Could not do it.\n/a/module.py(3): forward\n<frozen runpy>(198): _run_module_as_main\nValueError: bad\n'
    assert exporter_reason(RuntimeError(stack)) == 'ValueError: bad'
    assert exporter_reason(RuntimeError('Could not do it.\n/a/Error: b.py(3): forward\n')) == 'Could not do it'
