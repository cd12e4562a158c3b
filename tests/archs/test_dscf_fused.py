"""DSCF-Fused: what its layers stand for, by the weights of the DSCF that it was made of."""

import torch

from lora_sr import load_network


@torch.no_grad()
def test_its_layers_are_products_of_those_of_dscf(shared):
    fused = load_network(shared / 'weights/NTIRE2026/team15_DSCF_Fused.pth').double()
    dscf = load_network(shared / 'weights/DSCLoRA/DSCF_ch26_x4.pth').double()
    image = (torch.rand(1, 3, 12, 13, dtype=torch.float64) - dscf.mean) * dscf.img_range
    first = dscf.block_1.c1_r(dscf.conv_1(image))
    # At the border the second of two convolutions pads features, where the one pads the image.
    inside = (..., slice(1, -1), slice(1, -1))
    assert (fused.conv_fused(image) - first)[inside].abs().max() < 1e-4 < (fused.conv_fused(image) - first).abs().max()

    shallow, last, second, sixth = (torch.rand(1, 26, 9, 8, dtype=torch.float64) for _ in range(4))
    expected = dscf.conv_cat(torch.cat([shallow, dscf.conv_2(last), second, sixth], 1))
    found = fused.conv_cat_other(torch.cat([shallow, second, sixth], 1)) + fused.conv2_fused(last)
    assert (found - expected).abs().max() < 1e-4
    for name in ('conv_1', 'block_1.c3_r', 'block_4.c2_r', 'upsampler.0'):
        layer, other = fused.get_submodule(name), dscf.get_submodule(name)
        x = torch.rand(1, 3 if name == 'conv_1' else 26, 6, 6, dtype=torch.float64)
        assert torch.equal(layer(x), other(x))
