"""`lora-sr export chainner`: spandrel recognizes the file, and gives the trained network's images."""

import importlib.util

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from exported import TRAINED, save_trained, skip_without_half, soft_images

from lora_sr.archs import fold, is_training_form
from lora_sr.archs.span import SPAN, Conv3XC
from lora_sr.checkpoints import load_network
from lora_sr.cli.main import main
from lora_sr.deploy.exports import chainner, export_chainner
from lora_sr.errors import InputError


@pytest.fixture
def spandrel():
    return pytest.importorskip('spandrel', reason='spandrel proves what chaiNNer loads')


def load(spandrel, path):
    return spandrel.ModelLoader(device='cpu').load_from_file(str(path)).eval()


@torch.no_grad()
@pytest.mark.parametrize('name', ['SPAN', 'DSCLoRA'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_spandrel_gives_the_images_of_the_trained_network(spandrel, tmp_path, capsys, name, suffix):
    network = save_trained(TRAINED[name], tmp_path / 'net.pth')
    output = tmp_path / f'chainner{suffix}'
    assert main(['export', 'chainner', str(tmp_path / 'net.pth'), '-o', str(output)]) == 0
    assert f'wrote {output}' in capsys.readouterr().out
    descriptor = load(spandrel, output)
    assert descriptor.architecture.id == 'SPAN' and descriptor.scale == network.upscale
    assert descriptor.input_channels == descriptor.output_channels == 3
    for image in soft_images():
        expected = network(image.double())
        assert (descriptor.model(image) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize('channels', [1, 3])
def test_span_without_normalization(spandrel, tmp_path, channels):
    network = save_trained(
        lambda: SPAN(channels, channels, feature_channels=8, upscale=2, norm=False), tmp_path / 'net.pth'
    )
    export_chainner(tmp_path / 'net.pth', tmp_path / 'chainner.pth')
    descriptor = load(spandrel, tmp_path / 'chainner.pth')
    assert (descriptor.input_channels, descriptor.scale) == (channels, 2)
    for image in soft_images(channels):
        assert (descriptor.model(image) - network(image.double())).abs().max() <= 1e-6


def test_gray_span_with_normalization_is_refused(tmp_path):
    """spandrel subtracts three means of one channel, and fails."""
    save_trained(lambda: SPAN(1, 1, feature_channels=8, upscale=2), tmp_path / 'net.pth')
    with pytest.raises(InputError, match='a SPAN of 1 channel must have norm: false there, got one that normalizes'):
        export_chainner(tmp_path / 'net.pth', tmp_path / 'chainner.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['net.pth']


@torch.no_grad()
@pytest.mark.parametrize('name', ['SPAN/spantiny_ch26_x4', 'SPAN/span_ch28_x4', 'DSCLoRA/DSCF_ch26_x4'])
def test_official_weights_are_recognized_with_equal_output(shared, spandrel, tmp_path, name):
    export_chainner(shared / f'weights/{name}.pth', tmp_path / 'net.pth')
    descriptor, network = load(spandrel, tmp_path / 'net.pth'), load_network(shared / f'weights/{name}.pth')
    assert descriptor.scale == 4
    for image in soft_images():
        assert torch.equal(descriptor.model(image), network(image))


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_branches_fold_to_the_same_kernels_in_spandrel(spandrel, tmp_path, dtype):
    skip_without_half(dtype)
    save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    plain = fold(load_network(tmp_path / 'net.pth')).to(dtype)
    export_chainner(tmp_path / 'net.pth', tmp_path / 'chainner.pth')
    model = load(spandrel, tmp_path / 'chainner.pth').model.to(dtype)
    layers = [name for name, module in plain.named_modules() if isinstance(module, Conv3XC)]
    for name in layers:
        folded, ours = model.get_submodule(name), plain.get_submodule(name).eval_conv
        folded.eval_conv.weight.data.zero_()
        folded.update_params()
        assert torch.equal(folded.eval_conv.weight, ours.weight) and torch.equal(folded.eval_conv.bias, ours.bias)
    assert len(layers) == 20


@torch.no_grad()
def test_branches_give_the_same_images_also_where_they_run(tmp_path):
    network = save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    plain = fold(network).float()
    branched = TRAINED['SPAN']()
    branched.load_state_dict(chainner.as_branches(plain.state_dict()), strict=True)
    assert is_training_form(branched)
    image = soft_images()[0].double()
    expected = plain.double()(image)
    assert (branched.double()(image) - expected).abs().max() <= 1e-12 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    'build, architecture',
    [
        (lambda: RRDBNet(3, 3, 2, num_feat=8, num_block=1, num_grow_ch=32), 'ESRGAN'),
        (
            lambda: SwinIR(
                32, window_size=8, embed_dim=8, depths=[2], num_heads=[2], upscale=2, upsampler='pixelshuffle'
            ),
            'SwinIR',
        ),
    ],
)
def test_stock_networks_that_spandrel_knows(spandrel, tmp_path, build, architecture):
    network = save_trained(build, tmp_path / 'net.pth').float()
    export_chainner(tmp_path / 'net.pth', tmp_path / 'chainner.pth')
    descriptor = load(spandrel, tmp_path / 'chainner.pth')
    assert (descriptor.architecture.id, descriptor.scale) == (architecture, 2)
    image = torch.rand(1, 3, 24, 40)
    assert torch.equal(descriptor.model(image), network(image))


@pytest.mark.parametrize(
    'build, family',
    [
        (TRAINED['LKDN'], 'LKDN'),
        (lambda: EDSR(3, 3, num_feat=8, num_block=1), 'EDSR'),
        (lambda: RRDBNet(3, 3, 2, num_feat=8, num_block=1, num_grow_ch=16), 'RRDBNet'),
        (lambda: SRVGGNetCompact(num_feat=8, num_conv=2, act_type='relu'), 'SRVGGNetCompact'),
    ],
)
def test_networks_that_chainner_does_not_know_are_refused(tmp_path, build, family):
    save_trained(build, tmp_path / 'net.pth')
    with pytest.raises(InputError, match=f'knows no {family} of these sizes; chaiNNer also runs'):
        export_chainner(tmp_path / 'net.pth', tmp_path / 'chainner.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['net.pth']


@pytest.fixture
def without_spandrel(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *rest: None if name == 'spandrel' else find(name, *rest)
    )


def test_without_spandrel_our_own_loader_checks(without_spandrel, tmp_path, monkeypatch):
    save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    report = export_chainner(tmp_path / 'net.pth', tmp_path / 'chainner.pth')
    assert report.checked_by == 'lora_sr' and report.difference.largest == 0
    save_trained(lambda: RRDBNet(3, 3, 2, num_feat=8, num_block=1), tmp_path / 'rrdb.pth')
    with pytest.raises(InputError, match='pip install spandrel'):
        export_chainner(tmp_path / 'rrdb.pth', tmp_path / 'no.pth')
    right = chainner.as_branches
    monkeypatch.setattr(
        chainner,
        'as_branches',
        lambda state: {key: value + 0.01 if key == 'conv_1.sk.bias' else value for key, value in right(state).items()},
    )
    with pytest.raises(InputError, match="its images differ from the network's by"):
        export_chainner(tmp_path / 'net.pth', tmp_path / 'no.pth')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['chainner.pth', 'net.pth', 'rrdb.pth']


def test_mistakes_are_one_sentence_and_leave_files_alone(tmp_path, capsys):
    save_trained(TRAINED['SPAN'], tmp_path / 'net.pth')
    (tmp_path / 'there.pth').write_text('mine')
    for output, message in (('net.onnx', 'must end in .pth or .safetensors.'), ('there.pth', 'there.pth exists')):
        assert main(['export', 'chainner', str(tmp_path / 'net.pth'), '-o', str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / 'there.pth').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 2
