"""PSNRLoss: against BasicSR's PSNR and the definition in float64."""

import numpy as np
import pytest
import torch
from basicsr.losses import build_loss
from basicsr.metrics import calculate_psnr


def random_images(seed):
    return np.random.default_rng(seed).integers(0, 256, (3, 16, 12, 3), dtype=np.uint8)


def to_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_it_is_minus_the_mean_psnr_of_the_images():
    first, second = random_images(0), random_images(1)
    second[1] = first[1] // 2 + 60  # an image that is far closer than the others
    expected = np.mean([calculate_psnr(a, b, crop_border=0) for a, b in zip(first, second)])
    loss = build_loss({'type': 'PSNRLoss', 'loss_weight': 0.5, 'eps': 1e-12})
    assert loss(to_tensor(first), to_tensor(second)).item() == pytest.approx(-0.5 * expected, rel=1e-6)


def test_equal_images_reach_the_floor_without_a_gradient():
    image = to_tensor(random_images(2)).requires_grad_()
    value = build_loss({'type': 'PSNRLoss'})(image, image.detach())
    value.backward()
    assert value.item() == pytest.approx(-60)
    assert image.grad.abs().max() == 0


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = build_loss({'type': 'PSNRLoss', 'eps': 1e-3})
    assert torch.autograd.gradcheck(lambda x: loss(x, target), pred.requires_grad_())
