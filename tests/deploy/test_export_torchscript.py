"""`lora-sr export torchscript`: the file gives the trained network's images where there is no lora_sr."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from basicsr.archs import swinir_arch
from basicsr.archs.swinir_arch import SwinIR
from exported import TRAINED, psnr, save_trained, skip_without_half, soft_images

from lora_sr.archs.span import SPAN
from lora_sr.cli.main import main
from lora_sr.deploy.exports import deployed, export_torchscript
from lora_sr.errors import InputError

BARE = """
import sys, torch
sys.modules['lora_sr'] = sys.modules['basicsr'] = None
images = torch.load('images', weights_only=True)
with torch.no_grad():
    outputs = {name: list(map(torch.jit.load(f'{name}.pt'), images)) for name in sys.argv[1:]}
torch.save(outputs, 'outputs')
"""


@pytest.mark.slow
@torch.no_grad()
def test_file_gives_the_images_of_the_trained_network_in_a_bare_process(tmp_path, capsys):
    images = soft_images()
    torch.save(images, tmp_path / 'images')
    networks = {name: save_trained(build, tmp_path / f'{name}.pth') for name, build in TRAINED.items()}
    for name in networks:
        file = tmp_path / f'{name}.pt'
        assert main(['export', 'torchscript', str(tmp_path / f'{name}.pth'), '-o', str(file)]) == 0
        assert f'wrote {file}' in capsys.readouterr().out
    subprocess.run([sys.executable, '-c', BARE, *networks], check=True, cwd=tmp_path)
    outputs = torch.load(tmp_path / 'outputs', weights_only=True)
    for name, network in networks.items():
        for image, output in zip(images, outputs[name]):
            expected = network(image.double())
            assert (output - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize('name', TRAINED)
def test_loaded_file_changes_its_precision_and_names_no_device(tmp_path, name):
    network = save_trained(TRAINED[name], tmp_path / 'net.pth')
    export_torchscript(tmp_path / 'net.pth', tmp_path / 'net.pt')
    extra = {'metadata.json': ''}
    loaded = torch.jit.load(str(tmp_path / 'net.pt'), _extra_files=extra).double()
    for image in soft_images():
        expected = network(image.double())
        assert (loaded(image.double()) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert '"cpu"' not in str(loaded.inlined_graph)
    assert json.loads(extra['metadata.json'])['scale'] == str(network.upscale)


@torch.no_grad()
@pytest.mark.parametrize('name', ['SPAN/spantiny_ch26_x4', 'LKDN/LKDN_x4'])
def test_official_weights_run_in_half_precision(shared, tmp_path, name):
    skip_without_half(torch.float16)
    export_torchscript(shared / f'weights/{name}.pth', tmp_path / 'net.pt')
    loaded = torch.jit.load(str(tmp_path / 'net.pt')).half()
    truth = np.load(shared / f'golden/networks/{name.split("/")[1]}.npz')
    image, expected = (torch.from_numpy(truth[key]) for key in ('lr', 'sr'))
    assert psnr(loaded(image.half()), expected) >= 60


def test_mistakes_are_one_sentence_and_leave_files_alone(tmp_path, capsys, monkeypatch):
    save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    (tmp_path / 'there.pt').write_text('mine')
    swinir = SwinIR(
        32, embed_dim=8, depths=[2], num_heads=[2], window_size=8, upscale=2, upsampler='pixelshuffledirect'
    )
    torch.save(swinir.state_dict(), tmp_path / 'swinir.pth')
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for output, message in (('net.onnx', 'net.onnx must end in .pt.'), ('there.pt', 'there.pt exists')):
        assert main(['export', 'torchscript', str(tmp_path / 'net.pth'), '-o', str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(deployed, '_window_reverse', swinir_arch.window_reverse)  # wrong for two images
    with pytest.raises(InputError, match='what torch traces of its SwinIR is right for one image at a time alone'):
        export_torchscript(tmp_path / 'swinir.pth', tmp_path / 'net.pt')
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_checkpoint_is_blamed_for_what_is_wrong_with_it(tmp_path, capsys):
    network = SPAN(feature_channels=6, deploy=True)
    torch.nn.init.constant_(network.conv_cat.bias, torch.nan)
    torch.save(network.state_dict(), tmp_path / 'nan.pth')
    branched = SPAN(feature_channels=6)
    torch.nn.init.constant_(branched.conv_1.sk.bias, torch.nan)
    torch.save(branched.state_dict(), tmp_path / 'branches.pth')

    def error(checkpoint):
        assert main(['export', 'torchscript', str(tmp_path / checkpoint), '-o', str(tmp_path / 'net.pt')]) == 2
        return capsys.readouterr().err

    assert 'nan.pth holds values that are not finite: conv_cat.bias.' in error('nan.pth')
    assert 'branches.pth holds values that are not finite: conv_1.sk.bias.' in error('branches.pth')
    missing = tmp_path / 'absent.pth'
    assert (
        error(missing.name) == f'lora-sr: error: the checkpoint {missing} cannot be read: No such file or directory\n'
    )
    assert not (tmp_path / 'net.pt').exists()
