"""`lora-sr bench runtime`: it compares like with like, and says so."""

import pytest
import torch

from lora_sr.archs import fold
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN
from lora_sr.benchmarks.runtime import PUBLISHED, RefoldingConv3XC, make_forms, measure, refolding
from lora_sr.cli.main import main
from lora_sr.runtime.synthetic import synthetic_image


def networks():
    torch.manual_seed(0)
    return [SPAN(feature_channels=6, upscale=2, deploy=True).eval(), LKDN(num_feat=8, num_atten=8, num_block=1).eval()]


@pytest.mark.parametrize('network', networks(), ids=['SPAN', 'LKDN'])
def test_forms_give_the_same_image(network):
    image = synthetic_image(1, 3, 20, 28)
    forms, preparing = make_forms(network, image)
    measured = measure(network, forms, image, repeats=1)
    for name, row in measured.items():
        assert row.seconds > 0
        if 'float32' in name or 'channels-last' in name:
            assert row.psnr > 110 and row.equal > 0.99
        elif 'bfloat16' in name:
            assert row.psnr > 30
    assert measured[PUBLISHED].psnr > 110 and len(preparing) >= 2


def test_refolding_computes_what_the_branches_do():
    torch.manual_seed(0)
    network = SPAN(feature_channels=5, upscale=2).eval().double()
    image = synthetic_image(1, 3, 9, 11).double()
    again = refolding(network).double()
    again.load_state_dict({key: network.state_dict()[key.replace('.branches', '')] for key in again.state_dict()})
    assert sum(isinstance(module, RefoldingConv3XC) for module in again.modules()) == 20
    with torch.no_grad():
        assert torch.allclose(again(image), network(image), atol=1e-12)
        assert torch.allclose(again(image), fold(network)(image), atol=1e-12)


def test_command(tmp_path, capsys):
    path = tmp_path / 'SPAN.pth'
    torch.save(networks()[0].state_dict(), path)
    assert main(['bench', 'runtime', str(path), '--size', '24', '20', '--size', '9', '7']) == 0
    output = capsys.readouterr().out
    for part in ('SPAN.pth, LR 20x24 (width x height)', 'SPAN.pth, LR 7x9', 'floor of plain convolutions, float32'):
        assert part in output


@pytest.mark.parametrize('arguments', [['--size', '0', '5'], ['missing.pth']])
def test_wrong_calls(arguments, capsys):
    assert main(['bench', 'runtime', *arguments]) == 2
    assert capsys.readouterr().err.count('\n') == 1
