"""`lora-sr adapter`: from an adapted checkpoint to a file and back, mixes, fitted mixes, and every mistake."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.utils.registry import ARCH_REGISTRY
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lora_sr import load_network
from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    load_adapter,
    lora_layers,
    merge_adapter,
    mix_adapters,
    read_adapter,
    save_adapter,
)
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import AdapterFile, Checkpoint, NetworkSource, Origin
from lora_sr.cli.main import main
from lora_sr.deploy import mixing
from lora_sr.deploy.merge import merge_checkpoint
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.report.comparison import compare


@ARCH_REGISTRY.register()
class OfOnesOwn(nn.Module):
    """A network that this package does not know."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mlps = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.last = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x):
        features = self.norm(self.first(x - 0.5))
        for mlp in self.mlps:
            features = features + mlp(F.gelu(features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(self.last(features) * 0.3, 2) + F.interpolate(x, scale_factor=2)


GT_AS_LR = r'gt/0.png must have 14 x 12 pixels \(.*\), since lr/0.png has 28 x 24 and the scale is 2, got 56 x 48'


def adapt(base, config, seed):
    """``base`` with an adapter that changes its output by a few per cent."""
    base = add_lora(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in base.named_parameters():
            if 'lora_' in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
    return base


def known():
    network = MSRResNet(num_feat=8, num_block=1, upscale=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # at first BasicSR's weights do next to nothing
    return network


ARCHS = {
    'known': (
        known,
        LoRAConfig(['body.*', 'conv_hr'], rank=2, alpha=3),
        LoRAConfig(['upconv1', 'conv_.*'], rank=3, also_train=['bias']),
    ),
    'unknown': (
        OfOnesOwn,
        LoRAConfig(['.*'], rank=2, alpha=3, also_train=['norm']),
        LoRAConfig(['last'], rank=3, also_train=['bias']),
    ),
}


@pytest.fixture(params=ARCHS)
def files(request, tmp_path):
    """A folder with base.pth, two adapted checkpoints (as BasicSR writes them) and their adapters; and the network."""
    build, *configs = ARCHS[request.param]
    torch.manual_seed(0)
    base = build().eval()
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    start = base.state_dict()
    for name, config in zip('ab', configs):
        network = build().eval()
        network.load_state_dict(start)
        at_start = add_lora(network, config).state_dict()
        network = build().eval()
        network.load_state_dict(start)
        adapted = adapt(network, config, ord(name)).state_dict()
        torch.save({'params': at_start, 'params_ema': adapted}, tmp_path / f'net_{name}.pth')
        assert run('extract', tmp_path / f'net_{name}.pth', '-o', tmp_path / f'{name}.safetensors') == 0
    return tmp_path, base


def run(*arguments):
    return main(['adapter', *map(str, arguments)])


def load(network, path):
    network.load_state_dict(torch.load(path, weights_only=True)['params'], strict=True)
    return network.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_extract_apply_merge_give_the_adapted_networks_images(files, suffix):
    folder, base = files
    (folder / 'out').mkdir()
    adapted, plain = (folder / 'out' / f'{name}{suffix}' for name in ('adapted', 'plain'))
    assert run('apply', folder / 'base.pth', folder / 'a.safetensors', '-o', adapted) == 0
    assert run('merge', folder / 'base.pth', folder / 'a.safetensors', '-o', plain) == 0
    assert {path.name for path in (folder / 'out').iterdir()} == {adapted.name, plain.name}
    trained = torch.load(folder / 'net_a.pth', weights_only=True)['params_ema']
    written = Checkpoint.read(adapted).state
    assert written.keys() == trained.keys() and all(torch.equal(trained[key], value) for key, value in written.items())
    x = torch.rand(1, 3, 9, 12)
    before = base(x)
    base.load_state_dict(Checkpoint.read(plain).state, strict=True)
    merged = base.requires_grad_(False)(x)
    network = type(base)(**({'num_feat': 8, 'num_block': 1, 'upscale': 2} if type(base) is MSRResNet else {}))
    load_adapter(load(network.eval(), folder / 'base.pth'), folder / 'a.safetensors')
    assert torch.equal(network(x), merged) and (merged - before).abs().max() > 0.01
    if type(base) is MSRResNet:
        # What this command writes, the others read.
        assert torch.equal(load_network(adapted).requires_grad_(False)(x), merged)
        assert torch.equal(load_network(plain).requires_grad_(False)(x), merged)
    again = folder / f'again{suffix}'
    assert main(['merge', str(adapted), '-o', str(again)]) == 0
    expected = Checkpoint.read(plain).state
    assert all(torch.equal(value, expected[key]) for key, value in Checkpoint.read(again).state.items())
    assert run('extract', adapted, '-o', folder / 'once_more.safetensors') == 0
    first, second = (read_adapter(folder / f'{name}.safetensors') for name in ('a', 'once_more'))
    assert sorted(first.config.target_modules) == sorted(second.config.target_modules)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())


def test_mixing_is_linear_in_the_weights_and_0_is_the_base(files, capsys):
    folder, base = files
    adapters = [folder / 'a.safetensors', folder / 'b.safetensors']
    states = {}
    for weights in ((0, 0), (1, 0), (0, 1), (0.7, -0.2), (1.6, 2), (1, 1)):
        output = folder / f'{weights}.pth'
        mix = [f'{path}={weight}' for path, weight in zip(adapters, weights)]
        if weights == (1, 1):
            mix = adapters
        capsys.readouterr()
        assert run('merge', folder / 'base.pth', *mix, '-o', output) == 0
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:2]] == [f'{w:.4f}' for w in weights]
        states[weights] = torch.load(output, weights_only=True)['params']
    truth = base.state_dict()
    assert all(torch.equal(value, truth[key]) for key, value in states[0, 0].items())
    for (a, b), state in states.items():
        assert state.keys() == truth.keys()
        for key, value in state.items():
            zero, one, two = (states[weights][key].double() for weights in ((0, 0), (1, 0), (0, 1)))
            assert (value - (zero + a * (one - zero) + b * (two - zero))).abs().max() <= 1e-5
    assert run('apply', folder / 'base.pth', f'{adapters[0]}=0', '-o', folder / 'nothing.pth') == 0
    assert torch.load(folder / 'nothing.pth', weights_only=True)['params'].keys() == truth.keys()
    assert run('apply', folder / 'base.pth', *adapters, '-o', folder / 'both.pth') == 0
    assert run('info', folder / 'both.pth') == 0


@torch.no_grad()
def write_pairs(folder, network, count=3, scale=2):
    """Smooth random LR images, and what ``network`` makes of them as originals."""
    generator = torch.Generator().manual_seed(1)
    for name in ('gt', 'lr'):
        (folder / name).mkdir()
    for i in range(count):
        small = F.interpolate(torch.rand(1, 3, 5, 6, generator=generator), size=(24, 28 + i), mode='bicubic')
        lr = (small * 0.6 + 0.2).mul(255).round().clamp(0, 255)
        output = network(lr / 255).mul(255).round().clamp(0, 255)
        for name, image in (('lr', lr), ('gt', output)):
            bgr = image[0].permute(1, 2, 0).numpy()[:, :, ::-1].astype(np.uint8)
            cv2.imwrite(str(folder / name / f'{i}.png'), bgr)
    return ['--fit', '--gt', folder / 'gt', '--lr', folder / 'lr', '--scale', scale]


def option_file(folder, base):
    section = (
        '{type: OfOnesOwn}' if type(base) is OfOnesOwn else '{type: MSRResNet, num_feat: 8, num_block: 1, upscale: 2}'
    )
    path = folder / 'options.yml'
    path.write_text(f'name: mine\nnetwork_g: {{type: AdaptSR, base: {section}, lora: {{groups: [all], rank: 2}}}}\n')
    return ['-opt', path]


def test_fit_finds_the_weights_that_made_the_images(files, capsys):
    folder, base = files
    adapters = [folder / 'a.safetensors', folder / 'b.safetensors']
    mix = [f'{path}={weight}' for path, weight in zip(adapters, (0.7, -0.2))]
    assert run('merge', folder / 'base.pth', *mix, '-o', folder / 'truth.pth') == 0
    fit = write_pairs(folder, load(base, folder / 'truth.pth'))
    if type(base) is OfOnesOwn:
        fit += option_file(folder, base)
    capsys.readouterr()
    assert run('merge', folder / 'base.pth', *adapters, '-o', folder / 'fitted.pth', *fit) == 0
    printed = capsys.readouterr().out
    weights = [float(text) for text in re.findall(r'weight (-?[\d.]+)', printed)]
    assert weights == pytest.approx([0.7, -0.2], abs=1e-2)
    before, after = (float(text) for text in re.findall(r'([\d.]+|inf) dB', printed))
    assert 'on 3 images' in printed and after > before + 20

    # The printed PSNR is that of the files, with equal weights and with those that were found.
    if type(base) is MSRResNet:
        half = [f'{path}=0.5' for path in adapters]
        assert run('merge', folder / 'base.pth', *half, '-o', folder / 'half.pth') == 0
        checkpoints = {name: folder / f'{name}.pth' for name in ('half', 'fitted')}
        # Another memory format rounds differently, which a PSNR of 80 dB shows.
        rows = compare(checkpoints, {'pairs': (folder / 'gt', folder / 'lr')}).rows
        assert [row.quality['pairs'].psnr for row in rows[1:]] == pytest.approx([before, after], rel=3e-4)


def test_fit_is_never_worse_than_its_start(files, capsys):
    """It begins at the given weights, here at the best ones; and an adapter twice is one of the sum of the weights."""
    folder, base = files
    fit = write_pairs(folder, load(base, folder / 'base.pth')) + option_file(folder, base)
    a = folder / 'a.safetensors'
    assert run('apply', folder / 'base.pth', f'{a}=0', '-o', folder / 'same.pth', *fit) == 0
    printed = capsys.readouterr().out
    assert 'weight 0.0000' in printed and printed.count('inf dB') == 2
    assert run('merge', folder / 'base.pth', f'{a}=0.4', f'{a}=0.2', '-o', folder / 'twice.pth', '--force', *fit) == 0
    weights = [float(text) for text in re.findall(r'weight (-?[\d.]+)', capsys.readouterr().out)]
    assert weights == pytest.approx([0.1, -0.1], abs=1e-2)


def test_fit_finds_the_best_mean_psnr(files):
    """Against a scan, for two images that want different weights: the one with little noise counts for more."""
    folder, base = files
    adapter = read_adapter(folder / 'a.safetensors')
    write_pairs(folder, load(base, folder / 'base.pth'), count=2)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    rng = np.random.default_rng(0)

    def outputs(weight):
        base.load_state_dict(merge_adapter(start, mix_adapters([(adapter, weight)])))
        images = [cv2.imread(str(folder / 'lr' / f'{i}.png'))[:, :, ::-1] for i in range(2)]
        tensors = [torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))[None] for image in images]
        return [base(x)[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy() for x in tensors]

    for i, (weight, noise) in enumerate([(0.2, 3), (0.8, 12)]):
        image = outputs(weight)[i]
        image = np.clip(np.round(image + rng.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / 'gt' / f'{i}.png'), image[:, :, ::-1])
    truth = [cv2.imread(str(folder / 'gt' / f'{i}.png'))[:, :, ::-1].astype(float) for i in range(2)]
    luma = np.array([65.481, 128.553, 24.966]) / 255  # ITU-R BT.601

    def psnr(weight):
        errors = [((a - b)[2:-2, 2:-2] @ luma) for a, b in zip(outputs(weight), truth)]
        return np.mean([10 * np.log10(255**2 / np.square(error).mean()) for error in errors])

    best = max(psnr(weight) for weight in np.arange(-0.5, 1.5, 0.05))
    base.load_state_dict(start)
    fitted = mixing.fit_mix(base, [adapter], [1.0], folder / 'gt', folder / 'lr', 2)
    assert fitted.psnr_before == pytest.approx(psnr(1.0), abs=1e-3) and fitted.psnr_before < best - 0.5
    assert fitted.psnr_after == pytest.approx(psnr(fitted.weights[0]), abs=1e-3)
    assert fitted.psnr_after > best - 0.05  # it looks at R, G and B, the scan at Y


def test_fit_makes_the_lr_images_that_are_not_given(files):
    """Those that `lora-sr prepare` and `compare` make, which tests hold against MATLAB's; of odd sizes as well."""
    folder, base = files
    adapter = read_adapter(folder / 'a.safetensors')
    write_pairs(folder, base)
    for path in (folder / 'gt').iterdir():
        image = cv2.imread(str(path))
        cv2.imwrite(str(folder / 'lr' / path.name), bicubic_downscale(image, 2))
        cv2.imwrite(str(path), cv2.copyMakeBorder(image, 0, 1, 0, 1, cv2.BORDER_REPLICATE))
    given, made = (mixing.fit_mix(base, [adapter], [1.0], folder / 'gt', lr, 2) for lr in (folder / 'lr', None))
    assert made == given and made.psnr_after > made.psnr_before


def test_fit_takes_an_option_file_whose_network_has_lora(tmp_path, capsys):
    torch.manual_seed(0)
    base = SPAN(feature_channels=6, deploy=True).eval()
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    write_pairs(tmp_path, base, 1, 4)
    save_adapter(adapt(base, LoRAConfig(['conv_cat']), 0), tmp_path / 'a.safetensors')
    (tmp_path / 'o.yml').write_text('network_g: {type: DSCLoRA, feature_channels: 6, rank: 2}\n')
    fit = ['--fit', '--gt', tmp_path / 'gt', '--lr', tmp_path / 'lr', '--scale', 4, '-opt', tmp_path / 'o.yml']
    assert run('merge', tmp_path / 'base.pth', tmp_path / 'a.safetensors', '-o', tmp_path / 'm.pth', *fit) == 0
    assert capsys.readouterr().out.count('weight') == 1


def test_fit_leaves_the_network_as_it_was_and_takes_no_step_that_is_worse(files, monkeypatch):
    folder, base = files
    write_pairs(folder, load(base, folder / 'base.pth'))
    adapter = read_adapter(folder / 'a.safetensors')
    before = {key: value.clone() for key, value in base.state_dict().items()}
    monkeypatch.setattr(mixing._Search, 'step', lambda search, weights: torch.ones(1, dtype=torch.float64))
    fitted = mixing.fit_mix(base, [adapter], [0.2], folder / 'gt', folder / 'lr', 2)
    assert fitted.weights == [0.2] and fitted.psnr_before == fitted.psnr_after
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_info_groups_layers(files, capsys):
    folder, base = files
    capsys.readouterr()
    for name in ('a.safetensors', 'net_a.pth'):
        assert run('info', folder / name) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        adapter = read_adapter(folder / 'a.safetensors')
        total = sum(value.numel() for key, value in adapter.tensors.items() if key.endswith(('_A', '_B')))
        size = f'{(folder / name).stat().st_size:,}'
        if type(base) is MSRResNet:
            assert ['body.0.conv*', '2', '6x24,', '24x6', '2', '3', '576'] in lines
            assert ['conv_hr', '1', '6x24,', '24x6', '2', '3', '288'] in lines and total == 576 + 288
            assert ['nothing', 'besides'] in lines and ['3', 'layers', 'with', 'LoRA,', '864', 'parameters'] in lines
        else:
            assert ['mlps.*', '2', '2x8,', '8x2', '2', '3', '64'] in lines
            assert ['norm.weight', '1', '8', '-', '-', '8'] in lines
            assert ['2', 'parameters', 'with', 'a', 'delta', 'besides,', '16', 'values'] in lines
            assert ['4', 'layers', 'with', 'LoRA,', str(total), 'parameters'] in lines
        kind = ['adapter,'] if name == 'a.safetensors' else ['adapted', 'checkpoint,']
        assert [*kind, size, 'bytes'] in lines


def test_param_key_chooses_what_is_extracted(files, capsys):
    folder, _ = files
    output = folder / 'start.safetensors'
    assert run('extract', folder / 'net_a.pth', '-o', output, '--param-key', 'params') == 0
    assert not any(value.any() for key, value in read_adapter(output).tensors.items() if key.endswith('lora_B'))
    assert any(value.any() for key, value in read_adapter(folder / 'a.safetensors').tensors.items())
    assert f'wrote {output}' in capsys.readouterr().out


def test_base_in_training_form_is_sent_to_merge(tmp_path, capsys):
    """The authors' training checkpoints of SPAN hold a stale eval_conv, onto which an adapter would be lost."""
    torch.manual_seed(0)
    branched, deployed = SPAN(feature_channels=6).eval(), SPAN(feature_channels=6, deploy=True).eval()
    stale = {key: value for key, value in deployed.state_dict().items() if 'eval_conv' in key}
    torch.save({**branched.state_dict(), **stale}, tmp_path / 'training.pth')
    save_adapter(adapt(deployed, LoRAConfig([r'block_\d\..*']), 0), tmp_path / 'a.safetensors')
    assert run('merge', tmp_path / 'training.pth', tmp_path / 'a.safetensors', '-o', tmp_path / 'm.pth') == 2
    message = capsys.readouterr().err
    assert '18 of its 18 layers differ' in message and 'branches, which `lora-sr merge` folds' in message
    assert main(['merge', str(tmp_path / 'training.pth'), '-o', str(tmp_path / 'base.pth')]) == 0
    assert run('apply', tmp_path / 'base.pth', tmp_path / 'a.safetensors', '-o', tmp_path / 'm.pth') == 0
    assert len(list(lora_layers(load_network(tmp_path / 'm.pth')))) == 18

    # What goes onto the rest of it leaves no stale weight behind.
    save_adapter(adapt(SPAN(feature_channels=6), LoRAConfig(['conv_cat']), 0), tmp_path / 'rest.safetensors')
    assert run('merge', tmp_path / 'training.pth', tmp_path / 'rest.safetensors', '-o', tmp_path / 'rest.pth') == 0
    assert Checkpoint.read(tmp_path / 'rest.pth').state.keys() == branched.state_dict().keys()


def test_an_option_file_tells_what_stands_before_the_names_of_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = OfOnesOwn().eval()
    torch.save({'params': {f'mine.{key}': value for key, value in base.state_dict().items()}}, 'base.pth')
    options = option_file(tmp_path, base)
    expected = {key: value.clone() for key, value in base.state_dict().items()}
    save_adapter(adapt(base, LoRAConfig(['last'], rank=2, alpha=3), 0), 'a.safetensors')
    assert run('merge', 'base.pth', 'a.safetensors', '-o', 'm.pth', *options) == 0
    lora_A, lora_B, _ = (value.double() for value in read_adapter('a.safetensors').update_of('last'))
    updated = expected['last.weight'].double() + 1.5 * (lora_B @ lora_A).reshape(12, 8, 3, 3)
    merged = load(OfOnesOwn(), 'm.pth').state_dict()
    assert (merged.pop('last.weight') - updated).abs().max() <= 1e-6 * updated.abs().max()
    assert all(torch.equal(value, expected[key]) for key, value in merged.items())


def test_a_file_in_an_older_layout_keeps_its_names_and_its_precision(tmp_path, monkeypatch):
    """RRDBNet as BSRGAN's authors name it, in float16."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = RRDBNet(3, 3, num_feat=8, num_block=1, num_grow_ch=4).eval()
    renamed = {}
    for key, value in network.state_dict().items():
        key = key.replace('body.0.rdb', 'RRDB_trunk.0.RDB').replace('conv_body', 'trunk_conv')
        renamed[key.replace('conv_up', 'upconv').replace('conv_hr', 'HRconv')] = value.half()
    torch.save(renamed, 'base.pth')
    save_adapter(adapt(network, LoRAConfig(['conv_hr'], rank=2, alpha=3), 0), 'a.safetensors')
    assert run('merge', 'base.pth', 'a.safetensors', '-o', 'm.pth') == 0
    merged = torch.load('m.pth', weights_only=True)['params']
    assert list(merged) == list(renamed) and {value.dtype for value in merged.values()} == {torch.float16}
    lora_A, lora_B, _ = (value.double() for value in read_adapter('a.safetensors').update_of('conv_hr'))
    expected = renamed['HRconv.weight'].double() + 1.5 * (lora_B @ lora_A).reshape(8, 8, 3, 3)
    assert (merged['HRconv.weight'] - expected).abs().max() <= 2**-10 * expected.abs().max()
    assert all(torch.equal(value, renamed[key]) for key, value in merged.items() if key != 'HRconv.weight')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            'merge base.pth wide.safetensors -o m.pth',
            r'wide.safetensors does not fit the base .*base.pth: \d+ of',
        ),
        ('merge base.pth a.safetensors -o there.pth', 'there.pth exists: choose another name'),
        ('merge base.pth a.safetensors -o m.bin', 'must end in .pth or .safetensors'),
        ('merge base.pth a.safetensors -o absent/m.pth', 'The folder .*absent of the output does not exist'),
        ('extract net_a.pth -o there.safetensors', 'there.safetensors exists: choose another name'),
        ('extract net_a.pth -o a.pth', 'must end in .safetensors'),
        ('extract base.pth -o m.safetensors', 'base.pth cannot be used: There is no adapter to take out'),
        ('extract a.safetensors -o m.safetensors', 'a.safetensors is an adapter already'),
        ('extract net_a.pth -o m.safetensors --param-key ema', 'has no "ema"'),
        ('apply net_a.pth a.safetensors -o m.pth', 'net_a.pth carries LoRA already, where a checkpoint of the base'),
        ('apply a.safetensors a.safetensors -o m.pth', 'a.safetensors is an adapter, where a checkpoint of the base'),
        ('apply base.pth base.pth -o m.pth', 'base.pth is no adapter but a base checkpoint'),
        ('apply base.pth net_a.pth -o m.pth', 'net_a.pth is no adapter but an adapted checkpoint'),
        ('apply base.pth absent.safetensors -o m.pth', 'There is no adapter file .*absent.safetensors'),
        ('apply absent.pth a.safetensors -o m.pth', 'absent.pth cannot be read'),
        (
            'apply base.pth nan.safetensors -o m.pth',
            'nan.safetensors cannot be used: it has values that are not finite, in .*lora_B',
        ),
        ('info base.pth', 'no layer carries LoRA'),
        ('info absent.pth', 'absent.pth cannot be read'),
        ('merge base.pth a.safetensors -o m.pth --fit --lr lr', '--gt and --scale is not given'),
        ('merge base.pth a.safetensors -o m.pth --scale 2', '--scale is for --fit'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt lr --lr gt --scale 2 -opt o.yml', GT_AS_LR),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 4 -opt o.yml',
            'be 2, that of the .* got 4',
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt lr --lr lr --scale 2 -opt o.yml',
            'got lr and lr, which are the',
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt twins --lr lr --scale 2 -opt o.yml',
            'got that of 0.bmp: ren',
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt border --lr half --scale 2 -opt o.yml',
            'half/0.png must have more than 2 pixels each way, .* got 2 x 2',
        ),
        ('merge base.pth a.safetensors -o m.pth --import .', r'must be a .py file or a module, .* got "\."\.'),
        ('merge base.pth a.safetensors -o m.pth --import os.', r'must be a .py file or a module, .* got "os\."\.'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt lr --lr lr --scale 0 -opt o.yml', 'The scale is 0'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr none --scale 2 -opt o.yml', 'none.* not a folder'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt no.yml', 'no.yml cannot be read'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt none.yml', 'has no network_g'),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt name.yml',
            "no network 'Fast'",
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt key.yml',
            "depth is not a known key; did you mean 'width'",
        ),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt size.yml', 'does not fit'),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(files, capsys, monkeypatch, arguments, message):
    folder, base = files
    monkeypatch.chdir(folder)
    write_pairs(folder, base, 1)
    for name, length in (('border', 4), ('half', 2)):
        (folder / name).mkdir()
        cv2.imwrite(f'{name}/0.png', np.zeros((length, length, 3), np.uint8))
    shutil.copytree('gt', 'twins')
    shutil.copy('gt/0.png', 'twins/0.bmp')
    option_file(folder, base)
    (folder / 'options.yml').rename('o.yml')
    for name, text in (
        ('none', 'name: x'),
        ('name', 'network_g: {type: Fast}'),
        ('key', 'network_g: {type: OfOnesOwn, depth: 3}'),
        ('size', 'network_g: {type: OfOnesOwn, width: 9}'),
    ):
        (folder / f'{name}.yml').write_text(f'{text}\n')
    for name in ('there.pth', 'there.safetensors'):
        (folder / name).write_text('mine')
    wide = OfOnesOwn(12) if type(base) is OfOnesOwn else MSRResNet(num_feat=12, num_block=1, upscale=2)
    save_adapter(adapt(wide, LoRAConfig(groups=['all']), 0), 'wide.safetensors')
    damaged = read_adapter('a.safetensors')
    for key, value in damaged.tensors.items():
        if key.endswith('lora_B'):
            value[0, 0] = float('nan')
    save_adapter(damaged, 'nan.safetensors')
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A folder with base.pth, a folder of PEFT for it, and what kohya's scripts write for the same updates."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = known().eval()
    torch.save({'params': base.state_dict()}, 'base.pth')
    tensors, other = {}, {}
    for name in ('conv_hr', 'body.0.conv1'):
        down, up = torch.randn(2, 8, 3, 3) * 0.15, torch.randn(8, 2, 1, 1)
        tensors |= {f'base_model.model.{name}.lora_A.weight': down, f'base_model.model.{name}.lora_B.weight': up}
        flat = f'lora_unet_{name.replace(".", "_")}'
        other |= {f'{flat}.lora_down.weight': down, f'{flat}.lora_up.weight': up, f'{flat}.alpha': torch.tensor(3.0)}
    (tmp_path / 'peft').mkdir()
    save_file(tensors, 'peft/adapter_model.safetensors')
    (tmp_path / 'peft' / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    save_file(other, 'kohya.safetensors')
    expected = {key: value.double() for key, value in base.state_dict().items()}
    for name in ('conv_hr', 'body.0.conv1'):
        down, up = (tensors[f'base_model.model.{name}.lora_{end}.weight'].double() for end in 'AB')
        expected[f'{name}.weight'] += 1.5 * torch.einsum('or,riyx->oiyx', up[..., 0, 0], down)
    return tmp_path, base, expected


@torch.no_grad()
@pytest.mark.parametrize('adapter', ['peft', 'peft/adapter_model.safetensors', 'kohya.safetensors'])
def test_adapters_of_others_go_where_ours_go(foreign, adapter, capsys):
    folder, base, expected = foreign
    assert run('merge', 'base.pth', adapter, '-o', 'merged.pth') == 0
    state = torch.load('merged.pth', weights_only=True)['params']
    assert state.keys() == expected.keys()
    assert all((value - expected[key]).abs().max() <= 1e-6 for key, value in state.items())
    assert run('apply', 'base.pth', adapter, '-o', 'applied.pth') == 0
    assert run('extract', 'applied.pth', '-o', 'own.safetensors') == 0
    assert sorted(read_adapter('own.safetensors').layers) == ['body.0.conv1', 'conv_hr']
    capsys.readouterr()
    assert run('info', adapter) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    name = 'lora_unet_conv_hr' if adapter == 'kohya.safetensors' else 'conv_hr'
    assert [name, '1', '2x8x3x3,', '8x2x1x1', '2', '3', '160'] in lines
    assert ['2', 'layers', 'with', 'LoRA,', '320', 'parameters'] in lines
    assert main(['inspect', adapter]) == 0
    assert '2 layers, rank 2, alpha 3' in capsys.readouterr().out

    x = torch.rand(1, 3, 9, 12)
    network = load_network(NetworkSource('base.pth', adapters=[(adapter, 1.0)]))
    truth = known().eval().double()
    truth.load_state_dict(expected)
    assert (network(x) - truth(x.double())).abs().max() <= 1e-5 < 0.01 * (network(x) - base(x)).abs().max()
    assert run('merge', 'base.pth', f'{adapter}=0.5', 'own.safetensors=0.5', '-o', 'half.pth') == 0
    state = torch.load('half.pth', weights_only=True)['params']
    assert all((value - expected[key]).abs().max() <= 1e-6 for key, value in state.items())
    assert run('merge', 'base.pth', adapter, adapter, '-o', 'twice.pth') == 2
    assert 'are one adapter' in capsys.readouterr().err


@pytest.mark.parametrize('weight', ['', '=0.7', '=-1'])
@pytest.mark.parametrize('adapter', ['peft', 'kohya.safetensors', 'own.safetensors'])
@pytest.mark.parametrize(
    'command', ['adapter merge base.pth {}', 'merge base.pth --adapter {}', 'adapter apply base.pth {}']
)
def test_an_adapter_is_known_again_however_it_was_merged(foreign, capsys, command, adapter, weight):
    """By its file, whatever its tensors became on the way; and what has no weight is not in it."""
    folder, _, _ = foreign
    save_adapter(adapt(known(), LoRAConfig(['conv_first'], rank=2), 0), 'own.safetensors')
    other = 'own.safetensors' if adapter == 'peft' else 'peft'
    for name, mix in (('once', [f'{adapter}{weight}']), ('mixed', [f'{adapter}{weight}', f'{other}=0'])):
        arguments = (' --adapter ' if '--adapter' in command else ' ').join(mix)
        assert main([*command.format(arguments).split(), '-o', f'{name}.pth']) == 0
        if 'apply' in command:  # what it writes is merged, and what can be taken out of it is known as well
            assert run('extract', f'{name}.pth', '-o', 'extracted.safetensors', '--overwrite') == 0
            assert main(['merge', f'{name}.pth', '-o', 'merged.pth', '--overwrite']) == 0
            (folder / 'merged.pth').replace(f'{name}.pth')
            assert run('merge', f'{name}.pth', 'extracted.safetensors', '-o', 'twice.pth') == 2
            assert 'carries the adapter extracted' in capsys.readouterr().err
        for again in ('adapter merge {} ', 'adapter apply {} ', 'merge {} --adapter '):
            capsys.readouterr()
            assert main([*f'{again}{adapter}'.format(f'{name}.pth').split(), '-o', 'twice.pth']) == 2
            assert f'The base {name}.pth carries the adapter {adapter}' in capsys.readouterr().err
    assert run('merge', 'mixed.pth', other, '-o', 'both.pth') == 0


@pytest.mark.parametrize('adapter', ['peft', 'own.safetensors'])
def test_an_adapter_is_known_again_on_a_live_network_and_in_an_export(foreign, adapter, capsys):
    save_adapter(adapt(known(), LoRAConfig(['conv_first'], rank=2), 0), 'own.safetensors')
    base = known().eval()
    merge_checkpoint(NetworkSource(base, adapters=[(adapter, 0.5)]), 'merged.pth')
    assert run('merge', 'merged.pth', adapter, '-o', 'twice.pth') == 2
    assert 'merged.pth carries the adapter' in capsys.readouterr().err
    assert main(f'export torchscript base.pth --adapter {adapter}=0.5 -o net.pt'.split()) == 0
    extra = {'metadata.json': ''}
    torch.jit.load('net.pt', _extra_files=extra)
    origin = Origin.parse(json.loads(extra['metadata.json'])['lora_sr'])
    assert origin.adapters == Checkpoint.read('merged.pth').origin.adapters == (AdapterFile.read(adapter).fingerprint,)


@torch.no_grad()
def test_weights_are_fitted_to_adapters_of_others(foreign, capsys):
    folder, base, expected = foreign
    truth = known().eval()
    truth.load_state_dict(
        {key: (0.6 * value + 0.4 * base.state_dict()[key]).float() for key, value in expected.items()}
    )
    fit = write_pairs(folder, truth)
    assert run('merge', 'base.pth', 'peft', '-o', 'fitted.pth', *fit) == 0
    weight = re.search(r'weight (-?[\d.]+)', capsys.readouterr().out)
    assert float(weight[1]) == pytest.approx(0.6, abs=1e-2)


def test_export_gives_what_peft_reads(foreign, capsys):
    folder, _, expected = foreign
    config = LoRAConfig(['body.*', 'conv_hr'], rank=2, alpha=3)
    save_adapter(adapt(known(), config, 0), 'own.safetensors')
    assert run('merge', 'base.pth', 'own.safetensors=0.7', 'peft', '-o', 'merged.pth') == 0
    capsys.readouterr()
    assert run('export', 'base.pth', 'own.safetensors=0.7', 'peft', '--to', 'peft', '-o', 'deep/out') == 0
    printed = capsys.readouterr().out
    assert 'adapter in the layout of PEFT' in printed and printed.splitlines()[-1] == 'wrote deep/out'
    assert sorted(path.name for path in (folder / 'deep' / 'out').iterdir()) == [
        *('adapter_config.json', 'adapter_model.safetensors')
    ]
    options = json.loads((folder / 'deep' / 'out' / 'adapter_config.json').read_text())
    with safe_open('deep/out/adapter_model.safetensors', framework='pt') as file:
        assert file.metadata()['format'] == 'pt' and json.loads(file.metadata()['lora_sr'])['base']
        layers = {key.split('.lora_')[0][len('base_model.model.') :] for key in file.keys()}
    assert all(re.fullmatch(options['target_modules'], layer) for layer in layers)
    assert run('merge', 'base.pth', 'deep/out', '-o', 'again.pth') == 0
    merged, again = (torch.load(f'{name}.pth', weights_only=True)['params'] for name in ('merged', 'again'))
    assert all((again[key] - value).abs().max() <= 1e-5 * value.abs().max() for key, value in merged.items())
    before = (folder / 'deep' / 'out' / 'adapter_config.json').read_bytes()
    assert run('export', 'base.pth', 'peft', '-o', 'deep/out') == 2
    assert 'exists: choose another name, or allow it with --overwrite' in capsys.readouterr().err
    assert (folder / 'deep' / 'out' / 'adapter_config.json').read_bytes() == before
    assert run('export', 'base.pth', 'peft', '-o', 'deep/out', '--overwrite') == 0
    # Whoever trained it is told another base.
    torch.save({'params': {key: value.float() for key, value in expected.items()}}, 'another.pth')
    capsys.readouterr()
    assert run('merge', 'another.pth', 'deep/out', '-o', 'm.pth') == 2
    assert 'was trained on another base than another.pth' in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            'merge base.pth empty -o m.pth',
            'There is no adapter file empty: in a folder it must be called adapter_model.s',
        ),
        ('merge base.pth bare -o m.pth', 'bare/adapter_model.safetensors cannot be used: its alpha is unknown without'),
        (
            'merge base.pth wide.safetensors -o m.pth',
            r'1 of its 1 layers differ: conv_hr is 8x8x3x3 here, .* for 8x9x3x3',
        ),
        (
            'merge base.pth nan.safetensors -o m.pth',
            'nan.safetensors cannot be used: it has values that are not finite',
        ),
        ('apply peft peft -o m.pth', 'the checkpoint peft cannot be read: it must be a file, got a folder'),
        ('merge kohya.safetensors peft -o m.pth', 'kohya.safetensors is an adapter, where a checkpoint of the base is'),
        (
            'merge base.pth peft -o peft/adapter_model.safetensors --overwrite',
            'is the input peft/adapter_model.safetens',
        ),
        ('extract kohya.safetensors -o m.safetensors', 'kohya.safetensors is an adapter already'),
        ('export base.pth peft -o base.pth', 'The output base.pth must be a folder, got a file'),
        (
            'export base.pth peft -o peft --overwrite',
            'peft/adapter_model.safetensors is the input peft/adapter_model.saf',
        ),
        ('export base.pth peft=0 -o out', 'There is nothing to write: the adapter changes nothing'),
        (
            'export base.pth biased.safetensors -o out',
            'PEFT has no LoRA for 1 of its updates: conv_hr.bias is no weight',
        ),
        ('export odd.pth kohya.safetensors -o out', 'odd.pth belongs to no network known here'),
        ('info bare/adapter_config.json', 'must be in the format of torch or of safetensors, got a text in JSON'),
    ],
)
def test_mistakes_with_adapters_of_others_are_one_sentence(foreign, capsys, arguments, message):
    folder, base, _ = foreign
    for name in ('empty', 'bare'):
        (folder / name).mkdir()
    shutil.copy('peft/adapter_model.safetensors', 'bare')
    factors = {'conv_hr.lora_down.weight': torch.zeros(2, 8, 3, 3), 'conv_hr.lora_up.weight': torch.zeros(8, 2, 1, 1)}
    save_file({**factors, 'conv_hr.lora_down.weight': torch.zeros(2, 9, 3, 3)}, 'wide.safetensors')
    save_file({**factors, 'conv_hr.lora_up.weight': torch.full((8, 2, 1, 1), float('nan'))}, 'nan.safetensors')
    save_adapter(adapt(known(), LoRAConfig(['conv_hr'], also_train=['bias']), 0), 'biased.safetensors')
    torch.save({'conv_hr.weight': torch.ones(8, 8, 3, 3), 'body.0.conv1.weight': torch.ones(8, 8, 3, 3)}, 'odd.pth')
    if 'bare/adapter_config.json' in arguments:
        shutil.copy('peft/adapter_config.json', 'bare')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert run(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before


def test_weights_on_the_command_line(files, monkeypatch, capsys):
    folder, _ = files
    monkeypatch.chdir(folder)
    for text in ('a.safetensors=half', 'a.safetensors=nan', '=0.5', 'a.safetensors='):
        with pytest.raises(SystemExit, match='2'):
            run('merge', 'base.pth', text, '-o', 'm.pth')
        assert 'should be FILE or FILE=WEIGHT' in capsys.readouterr().err
    (folder / 'a.safetensors').rename('a=1.safetensors')
    assert run('merge', 'base.pth', 'a=1.safetensors', '-o', 'm.pth') == 0
    assert run('merge', 'base.pth', 'a=1.safetensors=0.5', '-o', 'm.pth') == 2
    assert run('merge', 'base.pth', 'a=1.safetensors=-5e-1', '-o', 'm.pth', '--overwrite') == 0
    assert 'weight -0.5000' in capsys.readouterr().out
