"""`lora-sr merge`: the plain checkpoint gives the trained network's images, and nothing is overwritten."""

import json

import numpy as np
import pytest
import torch

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, count_parameters, lora_layers
from lora_sr.archs import is_training_form, read_state_dict
from lora_sr.archs.dsclora_arch import DSCLoRA
from lora_sr.archs.lkdn_arch import LKDN, BSConvU, BSConvU_idt
from lora_sr.archs.span_arch import SPAN
from lora_sr.cli.main import main
from lora_sr.deploy import merge

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
    assert read_state_dict(output).keys() == SPAN(feature_channels=8, upscale=3, deploy=True).state_dict().keys()
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
        assert list(torch.load(output, weights_only=True)) == ['params']


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
    def forget_a_layer(network, path):
        torch.nn.init.zeros_(network.conv_cat.bias)
        write(network, path)

    write = merge._write
    monkeypatch.setattr(merge, '_write', forget_a_layer)
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(tmp_path / 'm.pth')]) == 2
    assert 'The written network differs from the trained one by' in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    'error, reason',
    [(OSError(28, 'No space left on device'), 'No space left on device'), (RuntimeError('x'), 'the disk may be full')],
)
def test_a_failure_to_write_is_one_sentence(adapted, tmp_path, monkeypatch, capsys, error, reason):
    def fail(network, path):
        path.write_text('a part')
        raise error

    monkeypatch.setattr(merge, '_write', fail)
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / 'net_g_10.pth'), '-o', str(tmp_path / 'm.pth')]) == 2
    assert capsys.readouterr().err == f'lora-sr: error: The output {tmp_path / "m.pth"} cannot be written: {reason}.\n'
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
        ('nan.pth', 'm.pth', 'nan.pth has weights too large for float32, or NaN'),
        ('branches.pth', 'm.pth', 'branches.pth cannot be folded: The folded B1.c1_r (BSConvU_rep) differs'),
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
