"""Arrays through a network: of any size, type and number of channels, whole and in tiles."""

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs.ridnet_arch import RIDNet
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.swinir_arch import SwinIR
from enlarging import Enlarge, pixels, repeated
from torch import nn
from torch.nn import functional as F

from lora_sr.adapters import lora_layers
from lora_sr.archs import take_any_size
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN
from lora_sr.errors import InputError
from lora_sr.runtime import upscaler as upscaler_module
from lora_sr.runtime.upscaler import Upscaler, upscale_image


@pytest.mark.parametrize('tile', [None, 11])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('network_channels', [1, 3])
@pytest.mark.parametrize('shape', [(13, 18), (13, 18, 1), (13, 18, 3)])
def test_every_level_of_every_channel_arrives(shape, network_channels, dtype, tile):
    image = pixels(*shape, dtype=dtype)
    result = upscale_image(Enlarge(3, network_channels), image, tile)
    assert result.dtype == dtype and np.array_equal(result, repeated(image, 3))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [2, 4])
def test_alpha_is_bicubic_and_opaque_stays_opaque(channels, dtype):
    image = pixels(12, 15, channels, dtype=dtype)
    peak = np.iinfo(dtype).max
    image[..., -1] |= 1  # nothing is hidden
    image[:6, :, -1] = peak
    result = upscale_image(Enlarge(2), image)
    assert np.array_equal(result[..., :-1], repeated(image[..., :-1]))
    assert (result[:8, :, -1] == peak).all()
    bicubic = cv2.resize(image[..., -1].astype(np.float64), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    assert np.abs(result[..., -1] - bicubic.clip(0, peak)).max() < 0.51


@pytest.mark.parametrize('tile', [None, 11])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [2, 4])
def test_colors_under_alpha_0_do_not_bleed(channels, dtype, tile):
    class Soft(Enlarge):
        def forward(self, x):
            return F.interpolate(self.conv(x), scale_factor=2, mode='bicubic')

    peak = np.iinfo(dtype).max
    y, x = np.mgrid[:32, :32]
    image = np.zeros((32, 32, channels), dtype)
    image[..., -1] = np.clip(10.5 - np.hypot(x - 15.5, y - 15.5), 0, 1) * peak
    image[image[..., -1] > 0, :-1] = peak  # a white disc, black where it is hidden
    result = upscale_image(Soft(), image, tile)
    assert (result[..., :-1] == peak).all()  # also at alpha 0: there is the color of what is nearest

    hidden = np.concatenate([pixels(32, 32, channels - 1, dtype=dtype), image[..., -1:]], 2)
    hidden[image[..., -1] > 0] = image[image[..., -1] > 0]
    assert np.array_equal(upscale_image(Soft(), hidden, tile), result)


def test_the_nearest_visible_color_is_taken():
    image = np.zeros((7, 9, 4), np.uint8)
    image[1, 2], image[5, 7] = (200, 10, 30, 1), (1, 2, 3, 255)
    result = upscale_image(Enlarge(1), image)
    y, x = np.mgrid[:7, :9]
    first, second = (y - 1) ** 2 + (x - 2) ** 2, (y - 5) ** 2 + (x - 7) ** 2
    assert (result[first < second, :3] == (200, 10, 30)).all() and (result[second < first, :3] == (1, 2, 3)).all()


def test_colors_stay_where_nothing_is_visible_or_the_channel_is_not_alpha():
    image = pixels(8, 8, 4)
    image[..., 3] = 0
    assert np.array_equal(upscale_image(Enlarge(), image), repeated(image))
    image[0, 0, 3] = 255
    assert np.array_equal(Upscaler(Enlarge())(image, has_alpha=False)[..., :3], repeated(image[..., :3]))


def test_gray_of_a_network_for_rgb_is_luma():
    class Tint(Enlarge):
        def forward(self, x):
            return super().forward(x) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)

    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colors = np.stack([image, image * 0.5, image * 0.25], 2).astype(np.float32) / 255
    expected = cv2.cvtColor(colors, cv2.COLOR_RGB2GRAY) * 255
    assert np.abs(upscale_image(Tint(1), image) - expected).max() < 0.51


def test_value_range_of_ridnet():
    torch.manual_seed(0)
    network = RIDNet(3, 16, 3, num_block=1).eval()
    image = pixels(20, 24, 3)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy()
    assert np.abs(upscale_image(network, image) - expected.clip(0, 255)).max() < 0.51
    assert expected.std() > 20


def test_network_is_merged_and_folded_and_not_changed():
    torch.manual_seed(0)
    network = DSCLoRA(feature_channels=6, upscale=2, rank=2).eval()
    for _, layer in lora_layers(network):
        nn.init.normal_(layer.lora_B, std=0.05)
    image = pixels(14, 15, 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        expected = network(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(upscale_image(network, image) - expected.clip(0, 255)).max() < 0.51
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad == ('lora' in name) for name, parameter in network.named_parameters())


def test_dtype_is_that_of_the_runtime(monkeypatch):
    asked = []
    monkeypatch.setattr(upscaler_module, 'optimize', lambda network, dtype: asked.append(dtype) or network)
    Upscaler(Enlarge(), dtype=torch.bfloat16)
    assert asked == [torch.bfloat16]


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 2)])
@pytest.mark.parametrize(
    'build',
    [
        lambda: SPAN(feature_channels=6, upscale=2),
        lambda: RRDBNet(3, 3, 2, num_feat=6, num_block=1, num_grow_ch=4),
        lambda: SwinIR(
            upscale=2, img_size=8, window_size=4, depths=[2], embed_dim=8, num_heads=[2], upsampler='pixelshuffle'
        ),
    ],
)
def test_tiny_images(build, size):
    assert upscale_image(take_any_size(build().eval()), pixels(*size, 3)).shape == (2 * size[0], 2 * size[1], 3)


@pytest.mark.parametrize(
    'image', [np.zeros((4, 4, 3), np.float64), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(image):
    with pytest.raises(InputError, match='The image has .* right'):
        upscale_image(Enlarge(), image)


class Soft(Enlarge):
    """Bicubic, and a little wrong: what is opaque becomes 254 of 255."""

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=self.scale, mode='bicubic') * 0.995


@pytest.mark.parametrize('tile', [None, 11])
@pytest.mark.parametrize('network_channels', [1, 3])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_floating_point_is_neither_rounded_nor_clipped(channels, network_channels, tile):
    image = np.random.default_rng(0).normal(0.5, 30, (13, 18, channels)).astype(np.float32)
    if channels in (2, 4):
        image[..., -1] = np.random.default_rng(1).uniform(0.01, 1, (13, 18))
    result = upscale_image(Enlarge(3, network_channels), image, tile)
    colors = channels - (channels in (2, 4))
    assert result.dtype == np.float32 and result.shape == (39, 54, channels)
    # Gray comes of three channels whose weights add up to 1 but for rounding.
    assert np.allclose(result[..., :colors], repeated(image, 3)[..., :colors], 1e-6, 0)
    if channels > colors:
        bicubic = cv2.resize(image[..., -1].astype(np.float64), None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
        assert np.abs(result[..., -1] - bicubic.clip(0, 1)).max() < 1e-5


def test_a_channel_of_floating_point_that_is_no_alpha_is_not_clipped():
    image = np.random.default_rng(0).normal(0.5, 30, (13, 18, 4)).astype(np.float32)
    result = Upscaler(Enlarge())(image, has_alpha=False)
    bicubic = cv2.resize(image[..., -1].astype(np.float64), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    assert np.abs(result[..., -1] - bicubic).max() < 1e-3 and result[..., -1].max() > 2
    assert np.array_equal(
        Upscaler(Enlarge())(image, has_alpha=False, alpha='network')[..., -1], repeated(image)[..., -1]
    )


def test_floating_point_that_is_not_finite_or_too_large():
    image = np.zeros((4, 4, 3), np.float32)
    image[2, 1, 1] = np.nan
    with pytest.raises(InputError, match='The image must have finite values, got NaN or infinity'):
        upscale_image(Enlarge(), image)
    large = np.full((64, 64), 3e38, np.float32)  # whose sum is not finite
    assert np.allclose(upscale_image(Enlarge(channels=1), large), 3e38)


@pytest.mark.parametrize('tile', [None, 30])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('network_channels', [1, 3])
@pytest.mark.parametrize('channels', [2, 4])
def test_alpha_through_the_network(channels, network_channels, dtype, tile):
    """As a gray image; what is opaque or transparent as far as the network sees stays so."""
    peak = 1 if dtype == np.float32 else np.iinfo(dtype).max
    y, x = np.mgrid[:60, :44]
    image = np.full((60, 44, channels), peak, dtype)
    image[..., -1] = np.clip(10.5 - np.hypot(x - 15.5, y - 15.5), 0, 1) * peak
    upscaler = Upscaler(Soft(2, network_channels), tile)
    result = upscaler(image, alpha='network')[..., -1].astype(np.float64)
    gray = upscaler(np.ascontiguousarray(image[..., -1])).astype(np.float64).clip(0, peak)
    kernel = np.ones(2 * [2 * upscaler.overlap + 1], np.uint8)
    alpha = image[..., -1].astype(np.float32)
    is_flat = repeated(cv2.erode(alpha, kernel) == cv2.dilate(alpha, kernel))
    assert 0 < is_flat.sum() < is_flat.size and upscaler.overlap > 0
    assert np.array_equal(result[is_flat], repeated(image[..., -1])[is_flat])
    assert np.abs(result[~is_flat] - gray[~is_flat]).max() <= (1e-6 if dtype == np.float32 else 1)
    assert (gray[is_flat].max() < peak) and result.max() == peak  # the network alone would lose it
    assert np.array_equal(upscaler(image, alpha='network')[..., :-1], upscaler(image)[..., :-1])


def test_alpha_keeps_the_inside_of_a_sprite_through_a_network_that_looks_far():
    """As RRDBNet does, whose field of view is larger than most sprites."""
    image = np.full((100, 100, 4), 255, np.uint8)
    y, x = np.mgrid[:100, :100]
    image[..., 3] = 255 * (np.hypot(x - 50, y - 50) < 30)
    upscaler = Upscaler(Soft(2, 3))
    upscaler._overlap = 60
    result = upscaler(image, alpha='network')[..., 3]
    kernel = np.ones((17, 17), np.uint8)  # 8 pixels around
    inside, outside = (
        repeated(one) for one in (cv2.erode(image[..., 3], kernel), 255 - cv2.dilate(image[..., 3], kernel))
    )
    assert (result[inside == 255] == 255).all() and (result[outside == 255] == 0).all()


def test_flat_alpha_does_not_run(monkeypatch):
    """An opaque image costs what one without alpha does."""
    image = pixels(13, 18, 4)
    image[..., 3] = 255
    upscaler = Upscaler(Soft())
    monkeypatch.setattr(upscaler, '_alpha_by_network', None)
    assert (upscaler(image, alpha='network')[..., 3] == 255).all()


def test_what_enlarges_alpha_is_known():
    with pytest.raises(InputError, match='alpha must be bicubic or network, got lanczos'):
        Upscaler(Enlarge())(pixels(4, 4, 4), alpha='lanczos')


@pytest.mark.parametrize('cuda, mps, expected', [(True, True, 'cuda'), (False, True, 'mps'), (False, False, 'cpu')])
def test_the_device_that_is_taken(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    assert upscaler_module.best_device() == torch.device(expected)


class LikeMPS:
    """A CPU that is called MPS, and has no float64 either."""

    type = 'mps'


@pytest.fixture
def like_mps(monkeypatch):
    moved = []
    monkeypatch.setattr(upscaler_module, 'best_device', LikeMPS)
    for kind in (torch.Tensor, nn.Module):
        to = kind.to

        def to_cpu(self, *args, _to=to, **kwargs):
            if args and isinstance(args[0], LikeMPS):
                moved.append(self)
                return self
            return _to(self, *args, **kwargs)

        monkeypatch.setattr(kind, 'to', to_cpu)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', None)
    monkeypatch.setattr(upscaler_module, 'free_memory', lambda device: 1 << 30)
    return moved


def test_what_mps_lacks_is_done_on_the_cpu(like_mps):
    """Branches are folded before the network is moved, and images are moved to it."""
    torch.manual_seed(0)
    network = SPAN(feature_channels=6, upscale=2).eval()
    image = pixels(14, 15, 4)
    upscaler = Upscaler(network)
    assert not any('sk' in name for name, _ in upscaler.network.named_parameters())  # the branches of the training form
    assert like_mps[0] is upscaler.network
    like_mps.clear()
    result = upscaler(image)
    assert len([one for one in like_mps if isinstance(one, torch.Tensor)]) == 2  # colors and alpha
    with torch.inference_mode():
        expected = network(torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1)[None] / 255)[0] * 255
    colors = upscaler(image, has_alpha=False)[..., :3]
    assert np.abs(colors - expected.permute(1, 2, 0).numpy().clip(0, 255)).max() < 0.51 and result.shape == (28, 30, 4)


def test_a_dtype_that_a_mac_does_not_know(like_mps, monkeypatch):
    def fail(network, dtype):
        raise TypeError('BFloat16 is not supported on MPS')

    monkeypatch.setattr(upscaler_module, 'optimize', fail)
    with pytest.raises(
        InputError, match=r'--dtype must be one that this Mac computes in, got torch.bfloat16: BFloat16'
    ):
        Upscaler(Enlarge(), dtype=torch.bfloat16)


def test_networks_that_cannot_be_used():
    with pytest.raises(InputError, match='Enlarge does not take RGB or gray images'):
        Upscaler(Enlarge(2, 5))
    absolute = SwinIR(img_size=8, window_size=4, depths=[2], embed_dim=8, num_heads=[2], ape=True, upsampler='')
    with pytest.raises(InputError, match='SwinIR does not take RGB or gray images of any size'):
        Upscaler(absolute)


def test_values_that_are_not_finite():
    network = Enlarge()
    upscaler = Upscaler(network)
    upscaler.runtime = lambda x: network(x) / 0
    with pytest.raises(InputError, match='Enlarge gives values that are not finite: it has weights that are NaN'):
        upscaler(pixels(4, 4, 3))
    upscaler.dtype = torch.float16
    with pytest.raises(InputError, match='Enlarge gives values that are not finite: float16 overflows'):
        upscaler(pixels(4, 4, 3))


@pytest.mark.parametrize('weight', [float('nan'), 3e38])
@pytest.mark.parametrize('tile', [None, 40])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_weights_that_cannot_be_right_are_told_at_once(weight, tile, dtype):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))
    nn.init.constant_(network[0].weight, weight)
    with pytest.raises(InputError, match='not finite: it has weights that are NaN or too large'):
        Upscaler(network, tile, dtype)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_rows_of_tiles_have_the_alpha_of_the_whole_image(scale):
    image = pixels(61, 23, 4)
    upscaler = Upscaler(Enlarge(scale), tile=11)
    alpha = torch.from_numpy(image[:, :, 3]).double()[None, None] / 255
    expected = F.interpolate(alpha, scale_factor=scale, mode='bicubic').clamp(0, 1)[0, 0].numpy() * 255
    bands = list(upscaler.bands(image))
    assert len(bands) > 3 and np.abs(np.concatenate(bands)[:, :, 3] - expected).max() <= 0.5 + 1e-3
