"""`lora-sr merge`: the plain checkpoint gives the trained network's images, and nothing is overwritten."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from basicsr.archs.ecbsr_arch import ECBSR
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.ridnet_arch import RIDNet
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from torch import nn

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, count_parameters, is_lora_key, lora_layers
from lora_sr.archs import is_training_form
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN, BSConvU, BSConvU_idt
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import Checkpoint, writing
from lora_sr.cli.main import main

LKDN_SIZES = {'num_feat': 6, 'num_atten': 4, 'num_block': 2, 'num_in': 2, 'upscale': 3}
REP = {'conv': 'BSConvU_rep', 'upsampler': 'pixelshuffle_rep'}


@pytest.fixture
def adapted(tmp_path):
    torch.manual_seed(0)
    network = DSCLoRA(feature_channels=8, upscale=3, rank=4).eval()
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.02)
    torch.save(
        {'params': DSCLoRA(feature_channels=8, upscale=3).state_dict(), 'params_ema': network.state_dict()},
        tmp_path / 'net_g_10.pth',
    )
    return network


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_merged_file_is_a_plain_span_with_the_same_output(adapted, tmp_path, capsys, suffix):
    output = tmp_path / f'merged{suffix}'
    assert main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(output)]) == 0
    merged = load_network(output)
    assert type(merged) is SPAN
    assert Checkpoint.read(output).state.keys() == SPAN(feature_channels=8, upscale=3, deploy=True).state_dict().keys()
    x = torch.rand(1, 3, 17, 19)
    assert torch.equal(merged(x), adapted(x))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    total = sum(p.numel() for p in adapted.parameters())
    assert capsys.readouterr().out.splitlines() == [
        'network               SPAN',
        f'layers with LoRA      20 ({trainable:,} parameters, {trainable / total:.1%} of all)',
        'modules folded        0',
        f'parameters            {total:,} -> {total - trainable:,}',
        'largest difference    0.0e+00 of the largest output (trained against written network)',
        f'wrote {output}',
    ]
    if suffix == '.pth':
        assert list(torch.load(output, weights_only=True)) == ['params', 'lora_sr']


def with_lora(network, targets):
    add_lora(network, LoRAConfig(targets, rank=2, alpha=4))
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.05)
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    'build, plain, targets, folded',
    [
        (lambda: LKDN(**LKDN_SIZES, **REP), lambda: LKDN(**LKDN_SIZES), None, 7),
        (lambda: LKDN(**LKDN_SIZES, **REP), lambda: LKDN(**LKDN_SIZES), ['.*'], 7),
        (
            lambda: LKDN(**LKDN_SIZES, **REP),
            lambda: LKDN(**LKDN_SIZES),
            [r'B\d\.c[123]_r\.(pw|dw|rep1x1)', r'upsampler\.conv.*'],
            7,
        ),
        (lambda: LKDN(**LKDN_SIZES, conv='BSConvU_rep'), lambda: LKDN(**LKDN_SIZES), ['c1'], 6),
        (lambda: SPAN(feature_channels=6), lambda: SPAN(feature_channels=6, deploy=True), None, 20),
        (lambda: SPAN(feature_channels=6), lambda: SPAN(feature_channels=6, deploy=True), [r'.*\.conv\.1', '.*sk'], 20),
    ],
    ids=['LKDN', 'LKDN, LoRA everywhere', 'LKDN, LoRA on branches', 'LKDN, LoRA elsewhere', 'SPAN', 'SPAN, LoRA'],
)
def test_lora_is_merged_and_then_branches_are_folded(tmp_path, capsys, build, plain, targets, folded):
    torch.manual_seed(0)
    network = build().eval()
    start = {'params': network.state_dict()}
    if targets:
        with_lora(network, targets)
    torch.save({**start, 'params_ema': network.state_dict()}, tmp_path / 'net.pth')
    assert main(['merge', str(tmp_path / 'net.pth'), '-o', str(tmp_path / 'plain.pth')]) == 0
    printed = capsys.readouterr().out
    assert f'modules folded        {folded}\n' in printed
    assert f'layers with LoRA      {len(list(lora_layers(network)))}' in printed
    written = plain().eval()
    assert f'{count_parameters(network).total:,} -> {count_parameters(written).total:,}\n' in printed
    written.load_state_dict(torch.load(tmp_path / 'plain.pth', weights_only=True)['params'], strict=True)
    x = torch.rand(2, 3, 13, 9, dtype=torch.float64)
    expected = network.double()(x)
    assert (expected - written.double()(x)).abs().max() <= 1e-5 * expected.abs().max()


SWINIR = {'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'mlp_ratio': 2}


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize(
    'build, channels, also_train',
    [
        (lambda: SwinIR(16, window_size=8, upsampler='pixelshuffle', **SWINIR), 3, ['bias', 'norm', 'position']),
        (lambda: SwinIR(14, window_size=7, upscale=1, in_chans=1, img_range=255.0, **SWINIR), 1, []),
        (lambda: RRDBNet(3, 3, 1, num_feat=8, num_block=1, num_grow_ch=4), 3, ['bias']),
        (lambda: EDSR(3, 3, num_feat=8, num_block=2, upscale=3), 3, []),
        (lambda: RCAN(3, 3, num_feat=16, num_group=1, num_block=2, upscale=2), 3, ['bias']),
        (lambda: MSRResNet(num_feat=8, num_block=2), 3, []),
        (lambda: SRVGGNetCompact(num_feat=8, num_conv=2), 3, []),
        (lambda: RIDNet(3, 16, 3, num_block=1), 3, ['bias']),
        (lambda: ECBSR(3, 3, 1, 8, False, 'prelu', 2), 3, []),
    ],
    ids=['SwinIR', 'SwinIR, gray', 'RRDBNet', 'EDSR', 'RCAN', 'MSRResNet', 'SRVGGNetCompact', 'RIDNet', 'ECBSR'],
)
def test_stock_networks_are_merged_to_themselves(tmp_path, capsys, build, channels, also_train, suffix):
    torch.manual_seed(0)
    network, plain = build().eval(), build().eval()
    add_lora(network, LoRAConfig(groups=['all'], rank=2, alpha=3, also_train=also_train))
    for name, parameter in network.named_parameters():
        if is_lora_key(name):
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    assert main(['merge', str(tmp_path / 'net.pth'), '-o', str(tmp_path / f'plain{suffix}')]) == 0
    printed = capsys.readouterr().out
    assert f'network               {type(plain).__name__}\n' in printed
    assert f'{count_parameters(network).total:,} -> {count_parameters(plain).total:,}\n' in printed
    assert 'largest difference    0.0e+00 of the largest output' in printed
    plain.load_state_dict(Checkpoint.read(tmp_path / f'plain{suffix}').state, strict=True)
    x = torch.rand(1, channels, 56, 56)  # whole windows of 7 and of 8
    assert torch.equal(plain(x), network(x))


@torch.no_grad()
@pytest.mark.parametrize('channels, size', [(3, (16, 24)), (1, (16, 16))])
def test_swinir_for_images_of_one_size(tmp_path, capsys, channels, size):
    torch.manual_seed(0)
    arguments = {'img_size': size, 'in_chans': channels, 'window_size': 8, 'upscale': 1, 'ape': True}
    network, plain = (SwinIR(**arguments, **SWINIR).eval() for _ in range(2))
    with_lora(network, [r'layers\..*'])
    torch.save(network.state_dict(), tmp_path / 'net.pth')
    assert main(['merge', str(tmp_path / 'net.pth'), '-o', str(tmp_path / 'plain.pth')]) == 0
    assert 'network               SwinIR\n' in capsys.readouterr().out
    plain.load_state_dict(Checkpoint.read(tmp_path / 'plain.pth').state, strict=True)
    x = torch.rand(1, channels, *size)
    assert torch.equal(plain(x), network(x))


class Own(nn.Module):
    """A network that is not known here, with layers of every kind that carries an update, one of them depthwise."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 5), padding='same')
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 3, 1)
        self.register_buffer('mask', torch.tensor([0.0, float('-inf')]))
        self.register_buffer('twin', self.mask)
        self.register_buffer('index', torch.arange(4))

    def forward(self, x):
        x = self.depthwise(self.first(x)).permute(0, 2, 3, 1)
        return self.last(self.mlp(self.norm(x)).permute(0, 3, 1, 2))


def adapted_own():
    torch.manual_seed(0)
    network = Own().eval()
    patterns = {'rank_pattern': {'mlp': 3}, 'alpha_pattern': {'last': 0.5}}
    add_lora(network, LoRAConfig(groups=['all'], rank=2, alpha=4, also_train=['bias', 'norm'], **patterns))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_lora_key(name):
                parameter.copy_(torch.randn_like(parameter))
    return network


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_network_that_is_not_known_is_merged_without_it(tmp_path, capsys, suffix):
    network, plain = adapted_own(), Own().eval()
    state = network.state_dict()
    torch.save({'params': plain.state_dict(), 'params_ema': state}, tmp_path / 'own.pth')
    output = tmp_path / f'plain{suffix}'
    assert main(['merge', str(tmp_path / 'own.pth'), '-o', str(output)]) == 0
    count, values = count_parameters(network), sum(value.numel() for value in state.values())
    assert capsys.readouterr().out.splitlines() == [
        'network               unknown here',
        f'layers with LoRA      4 ({count.lora:,} parameters, {count.lora / values:.1%} of all)',
        'modules folded        0',
        f'values in file        {values:,} -> {count.total - count.lora + 8:,}',
        'largest difference    not measured, as an unknown network cannot be run',
        f'wrote {output}',
    ]
    merged = Checkpoint.read(output).state
    plain.load_state_dict(merged, strict=True)
    exact = {key: value.double() for key, value in state.items()}
    for layer, scale in (('first', 4 / 2), ('depthwise', 4 / 2), ('mlp', 4 / 3), ('last', 0.5 / 2)):
        update = (exact[f'{layer}.lora_B'] @ exact[f'{layer}.lora_A']).reshape(exact[f'{layer}.weight'].shape)
        expected = exact[f'{layer}.weight'] + scale * update
        torch.testing.assert_close(merged[f'{layer}.weight'].double(), expected, rtol=1e-6, atol=1e-6)
    for key in ('first.bias', 'norm.weight', 'norm.bias'):
        layer, _, name = key.rpartition('.')
        expected = exact[key] + exact[f'{layer}.lora_shift_{name}']
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged['mask'], state['mask']) and torch.equal(merged['index'], state['index'])
    x = torch.rand(1, 3, 9, 11)
    assert torch.equal(plain(x), network(x))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda state: state['mlp.lora_B'].fill_(float('nan')), 'or NaN: mlp.weight.'),
        (lambda state: state['norm.lora_shift_bias'].fill_(3e38).add_(3e38), 'or NaN: norm.bias.'),
        (lambda state: state.pop('last.weight'), 'own.pth cannot be used: the layer "last" carries'),
        (
            lambda state: state.pop('mlp.lora_alpha'),
            'the layer "mlp" carries LoRA but lacks lora_alpha',
        ),
        (lambda state: [state.pop(key) for key in list(state) if is_lora_key(key)], 'belongs to no network known here'),
    ],
)
def test_a_damaged_file_of_a_network_that_is_not_known_is_one_sentence(tmp_path, capsys, change, message):
    state = adapted_own().state_dict()
    change(state)
    torch.save(state, tmp_path / 'own.pth')
    assert main(['merge', str(tmp_path / 'own.pth'), '-o', str(tmp_path / 'plain.pth')]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['own.pth']


@torch.no_grad()
def test_official_training_checkpoint_becomes_the_official_deploy_network(shared, tmp_path, capsys):
    measured = json.loads((shared / 'reference.json').read_text())['measured_with_official_code']
    before, after = (measured[name]['params'] for name in ('LKDN-S_x4', 'LKDN-S_del_rep_x4'))
    assert main(['merge', str(shared / measured['LKDN-S_x4']['weights']), '-o', str(tmp_path / 'net.pth')]) == 0
    printed = capsys.readouterr().out
    assert 'network               LKDN\nlayers with LoRA      0\nmodules folded        16\n' in printed
    assert f'{before:,} -> {after:,}' in printed
    network = load_network(tmp_path / 'net.pth', 'params')
    assert type(network.B1.c1_r) is BSConvU and not is_training_form(network)
    truth = np.load(shared / 'golden/networks/LKDN-S_del_rep_x4.npz')
    assert (network(torch.from_numpy(truth['lr'])) - torch.from_numpy(truth['sr'])).abs().max() <= 1e-4


@torch.no_grad()
def test_an_identity_that_runs_stays(tmp_path, capsys):
    network = LKDN(**LKDN_SIZES, conv='BSConvU_idt').eval()
    torch.save(network.state_dict(), tmp_path / 'idt.pth')
    assert main(['merge', str(tmp_path / 'idt.pth'), '-o', str(tmp_path / 'plain.pth')]) == 2
    assert 'idt.pth is a deploy-form checkpoint already: nothing to merge or fold.' in capsys.readouterr().err
    torch.save(with_lora(network, [r'.*_r\.pw']).state_dict(), tmp_path / 'idt.pth')
    assert main(['merge', str(tmp_path / 'idt.pth'), '-o', str(tmp_path / 'plain.pth')]) == 0
    written = load_network(tmp_path / 'plain.pth')
    x = torch.rand(1, 3, 9, 9)
    assert type(written.B2.c1_r) is BSConvU_idt and torch.equal(written(x), network(x))


def test_a_file_that_gives_other_images_is_not_kept(adapted, tmp_path, monkeypatch, capsys):
    def forget_a_layer(state, *arguments):
        write({**state, 'conv_cat.bias': torch.zeros_like(state['conv_cat.bias'])}, *arguments)

    write = writing._write
    monkeypatch.setattr(writing, '_write', forget_a_layer)
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(tmp_path / 'm.pth')]) == 2
    assert 'The written network differs from the trained one by' in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    'error, reason',
    [
        (OSError(28, 'No space left on device'), 'No space left on device'),
        (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 64'), 'the disk may be full'),
        (RuntimeError('CUDA error: out of memory\nmore'), 'CUDA error: out of memory'),
    ],
)
def test_a_failure_to_write_is_one_sentence(adapted, tmp_path, monkeypatch, capsys, error, reason):
    def fail(state, path, origin):
        path.write_text('a part')
        raise error

    monkeypatch.setattr(writing, '_write', fail)
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(tmp_path / 'm.pth')]) == 2
    assert capsys.readouterr().err == f'lora-sr: error: The output {tmp_path / "m.pth"} cannot be written: {reason}.\n'
    assert set(tmp_path.iterdir()) == files


def test_a_disk_that_becomes_read_only_is_one_sentence(adapted, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(writing, '_write', fail)
    monkeypatch.setattr(Path, 'unlink', fail)
    assert main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(tmp_path / 'm.pth')]) == 2
    assert 'm.pth cannot be written: Read-only file system.' in capsys.readouterr().err


@pytest.mark.parametrize('scale', ['x', [1, 2]])
def test_a_stated_value_that_does_not_run_is_one_sentence(tmp_path, capsys, scale):
    """A constructor may keep anything; the forward pass finds out."""
    network = add_lora(EDSR(3, 3, num_feat=4, num_block=1), LoRAConfig(['body.*'], rank=1))
    section = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'res_scale': scale}
    torch.save({'params': network.state_dict(), 'lora_sr': {'network': section}}, tmp_path / 'edsr.pth')
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / 'edsr.pth'), '-o', str(tmp_path / 'm.pth')]) == 2
    error = capsys.readouterr().err
    assert 'EDSR does not run with the values that it was built with: ' in error and error.count('\n') == 1
    assert set(tmp_path.iterdir()) == files


def test_another_failure_is_not_taken_for_one_to_write(adapted, tmp_path, monkeypatch):
    def fail(network, images):
        raise RuntimeError('of the forward pass')

    monkeypatch.setattr(SPAN, 'forward', fail)
    files = set(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match='^of the forward pass$'):
        main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(tmp_path / 'm.pth')])
    assert set(tmp_path.iterdir()) == files


def test_nothing_is_overwritten_or_left_behind(adapted, tmp_path, capsys):
    output = tmp_path / 'merged.pth'
    output.write_text('mine')
    arguments = ['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(output)]
    assert main(arguments) == 2
    assert output.read_text() == 'mine' and 'exists: choose another name' in capsys.readouterr().err
    assert main([*arguments, '--overwrite']) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['merged.pth', 'net_g_10.pth']


@pytest.mark.parametrize(
    'checkpoint, output, message',
    [
        ('absent.pth', 'm.pth', 'absent.pth cannot be read'),
        ('net_g_10.pth', 'm.pt', 'must end in .pth or .safetensors'),
        ('net_g_10.pth', 'absent/m.pth', 'does not exist'),
        ('plain.pth', 'm.pth', 'plain.pth is a deploy-form checkpoint already: nothing to merge or fold.'),
        ('nan.pth', 'm.pth', 'nan.pth holds values that are not finite: conv_2.eval_conv.lora_B.'),
        ('branches.pth', 'm.pth', 'branches.pth holds values that are not finite: B1.c1_r.pw.weight.'),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(adapted, tmp_path, capsys, checkpoint, output, message):
    torch.save(SPAN(feature_channels=8, deploy=True).state_dict(), tmp_path / 'plain.pth')
    branched = LKDN(**LKDN_SIZES, **REP)
    branched.B1.c1_r.pw.weight.data[0] = float('nan')
    torch.save(branched.state_dict(), tmp_path / 'branches.pth')
    adapted.conv_2.eval_conv.lora_B.data[0] = float('nan')
    torch.save(adapted.state_dict(), tmp_path / 'nan.pth')
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / checkpoint), '-o', str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert set(tmp_path.iterdir()) == files
