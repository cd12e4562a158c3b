"""Multiply-adds, against published numbers and torch's own counter."""

import json

import pytest
import torch
from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.archs import fold, load_network
from lora_sr.archs.lkdn_arch import LKDN, LKDN_S
from lora_sr.archs.span_arch import SPAN
from lora_sr.evaluation.complexity import count_multi_adds, count_multi_adds_720p


@pytest.fixture
def published(shared):
    return json.loads((shared / 'reference.json').read_text())['published']


def test_counts_are_those_of_the_lkdn_paper(published):
    table = published['LKDN paper, Table 5 (psnr/ssim on Y)']
    networks = {f'LKDN x{scale}': LKDN(upscale=scale) for scale in (2, 3, 4)}
    networks['LKDN-S x4'] = LKDN_S()
    for name, network in networks.items():
        assert round(count_multi_adds_720p(network, network.upscale) / 1e9, 1) == table[name]['multi_adds_g']


def test_counts_are_those_of_the_challenge_for_span(published):
    network = SPAN(feature_channels=26, deploy=True)
    expected = published['DSCLoRA (x4)']['SPAN-tiny']['flops_g_256']  # the challenge's FLOPs are multiply-adds
    assert round(count_multi_adds(network, 256, 256) / 1e9, 2) == expected


class EveryLayer(nn.Module):
    """Each kind of layer that is counted, with groups, strides, dilation and odd sizes; one layer runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 8, (3, 5), groups=4, dilation=2, padding='same')
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, output_padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        return self.linear(self.up(self.twice(self.twice(self.first(x)))).permute(0, 2, 3, 1))


def test_torch_counts_the_same():
    counter = pytest.importorskip('torch.utils.flop_counter').FlopCounterMode(display=False)
    network = EveryLayer()
    with counter, torch.no_grad():
        network(torch.zeros(1, 3, 21, 34))
    assert count_multi_adds(network, 21, 34) == counter.get_total_flops() / 2  # two operations a multiply-add


def test_layer_norm_counts_as_in_thop():
    for affine, each in ((True, 4), (False, 2)):
        assert count_multi_adds(nn.LayerNorm(7, elementwise_affine=affine), 5, 7) == each * 3 * 5 * 7


def test_lora_counts_as_merged_and_branches_as_they_run(shared):
    network = SPAN(feature_channels=6, deploy=True)
    plain = count_multi_adds(network, 20, 30)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    assert count_multi_adds(add_lora(network, LoRAConfig(['.*'], rank=2)), 20, 30) == plain
    # The network that was counted still runs, in its mode and on its device.
    assert network.training and network(torch.rand(1, 3, 8, 8)).device.type == 'cpu'
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())
    branched = load_network(shared / 'weights/LKDN/LKDN-S_x4.pth')
    with_branches = count_multi_adds_720p(branched, 4)
    assert with_branches > count_multi_adds_720p(fold(branched), 4) == count_multi_adds_720p(LKDN_S(), 4)
