"""`lora-sr merge`: the plain checkpoint gives the adapted network's images, and nothing is overwritten."""

import pytest
import torch

from lora_sr import load_network
from lora_sr.adapters import lora_layers
from lora_sr.archs import read_state_dict
from lora_sr.archs.dsclora_arch import DSCLoRA
from lora_sr.archs.span_arch import SPAN
from lora_sr.cli.main import main


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
    assert (merged(x) - adapted(x)).abs().max() <= 1e-5
    printed = capsys.readouterr().out
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    total = sum(p.numel() for p in adapted.parameters())
    assert f'{total - trainable:,}' in printed and f'{trainable:,} ({trainable / total:.1%}' in printed
    if suffix == '.pth':
        assert list(torch.load(output, weights_only=True)) == ['params']


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
        ('plain.pth', 'm.pth', 'carries no LoRA'),
        ('nan.pth', 'm.pth', 'differs from the adapted one'),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(adapted, tmp_path, capsys, checkpoint, output, message):
    torch.save(SPAN(feature_channels=8).state_dict(), tmp_path / 'plain.pth')
    adapted.conv_2.eval_conv.lora_B.data[0] = float('nan')
    torch.save(adapted.state_dict(), tmp_path / 'nan.pth')
    files = set(tmp_path.iterdir())
    assert main(['merge', str(tmp_path / checkpoint), '-o', str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert set(tmp_path.iterdir()) == files
