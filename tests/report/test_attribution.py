"""Local attribution maps: against closed forms, definitions, and SciPy's blur."""

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from lora_sr import load_network
from lora_sr.archs.info import NetworkInfo, set_info
from lora_sr.errors import InputError
from lora_sr.report.attribution import (
    SIGMA,
    attribution_map,
    diffusion_index,
    gradient_detector,
    signed_attribution,
)
from lora_sr.runtime.pixels import image_to_tensor


def picture(height=24, width=20, seed=0):
    """(1, 3, height, width), float64, in [0, 1]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blurred(image, sigma=SIGMA):
    """By SciPy: 9x9 pixels, mirrored about the outermost ones."""
    return torch.from_numpy(gaussian_filter(image.numpy(), (0, 0, sigma, sigma), mode='mirror', radius=(0, 0, 4, 4)))


def enlarger(depth=1, scale=2, activation=None):
    """Convolutions of 3x3, whose weights are random, and a pixel shuffle; float64."""
    torch.manual_seed(0)
    layers = []
    for number in range(depth):
        layers.append(nn.Conv2d(3, 3 * scale**2 if number == depth - 1 else 3, 3, padding=1))
        if activation is not None and number < depth - 1:
            layers.append(activation())
    return nn.Sequential(*layers, nn.PixelShuffle(scale)).double()


def brightness(output, window):
    """A linear detector."""
    x, y, side = window
    return output[..., y : y + side, x : x + side].sum()


def detail(output, window):
    """The definition, pixel by pixel."""
    x, y, side = window
    total = 0
    for row in range(y, min(y + side, output.shape[2] - 1)):
        for column in range(x, min(x + side, output.shape[3] - 1)):
            here = output[0, :, row, column]
            total += torch.hypot(output[0, :, row + 1, column] - here, output[0, :, row, column + 1] - here).sum()
    return float(total)


def mean_difference_gini(values):
    """By definition."""
    values = np.asarray(values, np.float64).ravel()
    return np.abs(values[:, None] - values).mean() / (2 * values.mean())


@pytest.mark.parametrize('window', [(4, 6, 8), (0, 0, 1), (30, 38, 10), (0, 0, 40)])
def test_the_detector_sums_magnitudes_of_gradients(window):
    image = picture(48, 40)
    assert float(gradient_detector(image, window)) == pytest.approx(detail(image, window), abs=1e-9)


def test_the_detector_of_a_flat_image_has_no_nan():
    image = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)
    image[..., 6:, :] = 0.25
    image.requires_grad_()
    gradient_detector(image, (0, 0, 12)).backward()
    assert image.grad.isfinite().all() and image.grad.any()


@pytest.mark.parametrize('steps', [1, 7])
def test_what_is_linear_is_exact(steps):
    network, image, window = enlarger(), picture(), (10, 20, 6)
    given = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(brightness(network(given), window), given)
    expected = (image - blurred(image)) * gradient
    found = signed_attribution(network, image, window, steps, detector=brightness)
    torch.testing.assert_close(found[None], expected, rtol=0, atol=1e-12)


def test_a_difference_along_a_path_is_shared_out_in_full():
    """Completeness, of the paper's detector and a network that is not linear; the error is of the order of a step."""
    network, image, window = enlarger(3, activation=nn.GELU), picture(), (8, 12, 16)
    with torch.no_grad():
        difference = detail(network(image), window) - detail(network(blurred(image)), window)
    errors = [float(signed_attribution(network, image, window, steps).sum()) - difference for steps in (50, 400)]
    assert abs(errors[0]) < 0.05 * abs(difference)
    assert abs(errors[1]) < 0.007 * abs(difference) and 6 < errors[0] / errors[1] < 10


def test_a_step_ends_where_its_gradient_is_taken():
    """With two steps: at half the blur, and at the image."""
    network, image, window = enlarger(2, activation=nn.GELU), picture(), (8, 8, 8)
    path = [blurred(image), blurred(image, SIGMA / 2), image]
    expected = torch.zeros_like(image)
    for before, after in zip(path, path[1:]):
        given = after.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(gradient_detector(network(given), window), given)
        expected += gradient * (after - before)
    torch.testing.assert_close(signed_attribution(network, image, window, 2)[None], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('depth', [1, 3])
def test_nothing_is_attributed_outside_of_the_receptive_field(depth):
    """Of 3x3 convolutions: a pixel a layer around those that the window, and the next pixel of it, are made of."""
    found = attribution_map(enlarger(depth), picture(), (16, 20, 4), steps=3)
    inside = np.zeros((24, 20), bool)
    inside[10 - depth : 13 + depth, 8 - depth : 11 + depth] = True
    inside[12 + depth, 10 + depth] = False  # the pixel across the corner takes no part in the gradient
    assert (found[inside] > 0).all() and not found[~inside].any()


def test_maps_are_magnitudes_of_sums_over_channels():
    network, image, window = enlarger(2), picture(), (4, 4, 12)
    signed = signed_attribution(network, image, window, 5)
    found = attribution_map(network, image, window, 5)
    assert found.shape == (24, 20) and found.dtype == np.float64 and found.max() == 1
    expected = np.abs(signed.numpy().sum(axis=0))
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-14)


def test_what_a_blur_does_not_change_has_an_empty_map():
    flat = torch.full((1, 3, 16, 16), 0.3, dtype=torch.float64)
    assert not attribution_map(enlarger(), flat, (8, 8, 8), 5).any()


class Wide(nn.Module):
    """A network for values from 0 to 255."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        set_info(self, NetworkInfo(3, 3, 2, value_range=255))

    def forward(self, x):
        return self.network(x / 255) * 255


def test_values_from_0_to_255():
    network, image, window = enlarger(2, activation=nn.GELU), picture(), (8, 8, 8)
    torch.testing.assert_close(
        signed_attribution(Wide(network), image, window, 3), signed_attribution(network, image, window, 3)
    )


def test_the_network_is_unchanged():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Dropout(0.5), nn.PixelShuffle(2))
    network.train()
    network[1].eval()
    network[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    image = picture().float()
    with torch.inference_mode():
        first = attribution_map(network, image, (8, 8, 8), 2)
    assert np.array_equal(first, attribution_map(network, image, (8, 8, 8), 2))  # nothing was dropped
    assert [module.training for module in network.modules()] == [True, True, False, True, True]
    assert all(parameter.grad is None for parameter in network.parameters()) and not image.requires_grad
    assert [parameter.requires_grad for parameter in network.parameters()] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_float32_comes_close():
    network, image, window = enlarger(3, activation=nn.GELU), picture(), (8, 8, 8)
    expected = attribution_map(network, image, window, 5)
    found = attribution_map(network.float(), image, window, 5)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('seed', range(3))
def test_the_index_is_by_the_mean_difference(seed):
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=(17, 13)) ** 3 * (rng.random((17, 13)) > 0.3)
    assert diffusion_index(values) == pytest.approx(100 * (1 - mean_difference_gini(values)), abs=1e-9)
    assert diffusion_index(values * 1e-200) == pytest.approx(diffusion_index(values), abs=1e-9)


def test_indices_in_closed_form():
    assert diffusion_index(np.full((8, 9), 0.3)) == pytest.approx(100)
    one = np.zeros((64, 64))
    one[3, 5] = 0.7
    assert diffusion_index(one) == pytest.approx(100 / 64**2)
    assert diffusion_index(np.arange(1, 101)) == pytest.approx(100 * (1 - 99 / 300))  # (n - 1) / (3 n) for 1, …, n
    half = np.repeat([0, 1], 50)
    assert diffusion_index(half) == pytest.approx(50)


@pytest.mark.parametrize('values', [[0, 0], [1, -1], [1, np.nan], [1, np.inf], []])
def test_what_is_no_map(values):
    with pytest.raises(InputError, match='^An attribution map must have .*, got .*[.]$'):
        diffusion_index(values)


def test_lkdn_looks_further_than_span(shared):
    """LKDN has attention, with which the paper finds networks to look further; in the middle of each image of Set5."""
    weights = {'LKDN': 'LKDN/LKDN_x4', 'SPAN26': 'SPAN/spantiny_ch26_x4', 'SPAN28': 'SPAN/span_ch28_x4'}
    networks = {name: load_network(shared / f'weights/{file}.pth') for name, file in weights.items()}
    images = sorted((shared / 'data/benchmark/Set5/LRbicx4').iterdir())
    assert len(images) == 5
    for path in images:
        image = cv2.imread(str(path))
        top, left = (image.shape[0] - 48) // 2, (image.shape[1] - 48) // 2
        part = image_to_tensor(image[top : top + 48, left : left + 48])
        found = {
            name: diffusion_index(attribution_map(network, part, (88, 88, 16), 5)) for name, network in networks.items()
        }
        assert found['LKDN'] > 1.7 * max(found['SPAN26'], found['SPAN28'])


@pytest.mark.parametrize(
    'change, message',
    [
        ({'window': (33, 8, 8)}, 'within the 40 x 48 pixels of the output, got 8 x 8 pixels'),
        ({'window': (-1, 8, 8)}, 'The window must be'), ({'window': (8, 41, 8)}, 'at x 8, y 41[.]'),
        ({'window': (8, 8, 0)}, 'The window must be'), ({'steps': 0}, 'The steps must be from 1 to 1,000, got 0[.]'),
        ({'sigma': 0}, 'Sigma must be a number above 0, got 0[.]'), ({'sigma': float('nan')}, 'Sigma must be'),
        ({'image': torch.rand(3, 24, 20)}, r'must have the shape \(1, 3, height, width\), got \(3, 24, 20\)[.]'),
        ({'image': torch.rand(1, 1, 24, 20)}, 'The image must have the shape'),
        ({'network': nn.Flatten()}, 'The network must give an image .*, got a Flatten'),
    ],
)  # fmt: skip
def test_what_cannot_be_attributed(change, message):
    arguments = {'network': enlarger(), 'image': picture(), 'window': (8, 8, 8), **change}
    with pytest.raises(InputError, match=message):
        attribution_map(**arguments)


class InPlace(nn.Module):
    """Changes what its own gradient needs, as PLKSR does in eval mode."""

    def __init__(self, network, changes):
        super().__init__()
        self.first, self.second, self.last = network[0], network[2], network[4:]
        self.changes = changes

    def forward(self, x):
        seen = self.first(x).sigmoid()
        if not self.changes:
            return self.last(torch.cat([self.second(seen).square()[:, :1], seen[:, 1:]], dim=1))
        seen[:, :1] = self.second(seen).square()[:, :1]
        return self.last(seen)


def test_networks_that_work_in_place():
    network, window = enlarger(3, activation=nn.ReLU), (8, 8, 8)
    expected, found = (signed_attribution(InPlace(network, changes), picture(), window, 3) for changes in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(x).detach()


def test_networks_without_a_gradient_or_a_result():
    with pytest.raises(InputError, match='must be one that gradients go through, got a Detached'):
        attribution_map(Detached(enlarger()), picture(), (8, 8, 8))
    network = enlarger()
    nn.init.constant_(network[0].bias, torch.inf)
    with pytest.raises(InputError, match='values that are not finite'):
        attribution_map(network, picture(), (8, 8, 8))
