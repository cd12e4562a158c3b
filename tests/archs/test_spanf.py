"""SPANF: its training form, and its shortcut."""

import pytest
import torch
from torch.nn import functional as F

from lora_sr import load_network
from lora_sr.archs import SPANF, fold, is_training_form
from lora_sr.archs.span import Conv3XC
from lora_sr.archs.spanf import make_conv_near


@torch.no_grad()
@pytest.mark.parametrize('layout', ['SPANF', 'PDS'])
def test_folding_is_exact_in_float64(layout):
    torch.manual_seed(0)
    network = SPANF(feature_channels=6, upscale=3, tail_channels=4, layout=layout).double()
    assert all(layer.is_training_form for layer in network.modules() if isinstance(layer, Conv3XC))
    x = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    expected = network(x)
    torch.testing.assert_close(fold(network)(x), expected, rtol=1e-12, atol=1e-12)
    plain = SPANF(feature_channels=6, upscale=3, tail_channels=4, layout=layout, deploy=True).double()
    plain.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(plain(x), network(x))


@torch.no_grad()
def test_a_training_checkpoint_loads_in_either_form(tmp_path):
    torch.manual_seed(0)
    network = SPANF(feature_channels=6, upscale=2).eval()
    x = torch.rand(1, 3, 8, 8)
    torch.save(network.state_dict(), tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    assert is_training_form(loaded) and torch.equal(loaded(x), network(x))
    deploy = SPANF(feature_channels=6, upscale=2, deploy=True)
    deploy.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(deploy(x), network(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('upscale', [2, 3])
def test_the_shortcut_starts_as_nearest_neighbor_upsampling(upscale):
    x = torch.rand(2, 3, 5, 7)
    near = F.pixel_shuffle(make_conv_near(3, upscale)(x), upscale)
    assert torch.equal(near, F.interpolate(x, scale_factor=upscale, mode='nearest'))
