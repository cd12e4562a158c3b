"""Tiles: they cover an image, overlap as they should, and give what the whole image gives."""

import math
import random
import re

import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.swinir_arch import SwinIR
from community_networks import SMALL
from skimage import data
from torch import nn

from lora_sr import load_network
from lora_sr.archs import NetworkInfo, take_any_size
from lora_sr.archs.info import set_info
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.receptive_field import find_alignment, receptive_radius
from lora_sr.archs.span import SPAN
from lora_sr.archs.tiles import Cut, cut_axis, smallest_tile
from lora_sr.errors import InputError
from lora_sr.runtime import tiling
from lora_sr.runtime.tiling import bytes_per_pixel, free_memory, largest_tile
from lora_sr.runtime.upscaler import Upscaler


def test_tiles_cover_an_axis_and_keep_their_distance_from_cuts():
    draw = random.Random(0)
    for _ in range(3000):
        multiple, overlap = draw.choice([1, 1, 2, 7, 8]), draw.randrange(0, 40)
        length, tile = draw.randrange(1, 700), smallest_tile(overlap, multiple) + draw.randrange(0, 60)
        spans = cut_axis(length, tile, overlap, multiple)
        case = length, tile, overlap, multiple, spans
        assert (spans[0].start, spans[0].first, spans[-1].stop, spans[-1].last) == (0, 0, length, length), case
        for span, after in zip(spans, spans[1:]):
            assert span.last == after.first, case
            assert span.stop - span.last >= overlap and after.first - after.start >= overlap, case
        for span in spans:
            assert span.start % multiple == 0 and span.first < span.last, case
            seen = -(-(span.stop - span.start) // multiple)  # in multiples, as the network pads it
            assert seen * multiple <= tile and (len(spans) == 1 or seen == tile // multiple), case


def test_no_more_tiles_than_needed():
    assert len(cut_axis(100, 100, 20)) == 1
    assert len(cut_axis(101, 100, 20)) == len(cut_axis(160, 100, 20)) == 2
    assert len(cut_axis(161, 100, 20)) == 3


def convolutions(*layers: tuple[int, int]) -> nn.Sequential:
    """3x3 convolutions, each of (dilation, stride of upsampling), that sum up what they see."""
    modules = []
    for dilation, scale in layers:
        conv = nn.Conv2d(3, 3 * scale**2, 3, padding=dilation, dilation=dilation, groups=3)
        nn.init.constant_(conv.weight, 1 / 9)
        modules += [conv, nn.PixelShuffle(scale)]
    return nn.Sequential(*modules)


def radius(network):
    return receptive_radius(network, NetworkInfo(3, 3, 1))


@pytest.mark.parametrize(
    'layers, reach', [([(1, 2)], 1), ([(1, 1), (1, 3)], 2), ([(5, 1), (1, 1), (2, 1)], 8), ([(30, 1), (30, 2)], 60)]
)
def test_overlap_is_the_receptive_field_where_all_of_it_counts(layers, reach):
    assert radius(convolutions(*layers)) == reach


def test_overlap_counts_every_direction():
    for shift in ((7, 0), (-7, 0), (0, 7), (0, -7)):

        class Shift(nn.Module):
            def forward(self, x, shift=shift):
                padded = nn.functional.pad(x, (7, 7, 7, 7))
                rows, columns = (slice(7 + by, 7 + by + size) for by, size in zip(shift, x.shape[2:]))
                return padded[:, :, rows, columns]

        assert radius(Shift()) == 7


def test_rounding_errors_do_not_count():
    class Rounding(nn.Module):
        """Makes much of the precision, differently from one size to another."""

        def forward(self, x):
            return x + 1e5 * torch.finfo(x.dtype).eps * x.shape[2] * x.shape[3]

    assert radius(nn.Sequential(convolutions((5, 1)), Rounding())) == 5


def swinir():
    network = SwinIR(
        upscale=2, img_size=16, window_size=4, depths=[2, 2], embed_dim=12, num_heads=[2, 2], upsampler='pixelshuffle'
    )
    return take_any_size(network.eval())


def rrdbnet(scale=4):
    network = RRDBNet(3, 3, scale, num_feat=12, num_block=2, num_grow_ch=8)
    for module in network.modules():  # they start so small that no pixel has an influence on another
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, 0.2)
            module.weight.data *= 0.7
    return take_any_size(network.eval())


NETWORKS = {
    'SPAN': lambda: SPAN(feature_channels=12, upscale=2),
    'LKDN': lambda: LKDN(num_feat=12, num_atten=12, num_block=3, num_in=2, upscale=3),
    'EDSR': lambda: EDSR(3, 3, num_feat=16, num_block=4, upscale=2),
    'RRDBNet': rrdbnet,
    'RRDBNet x2': lambda: rrdbnet(2),
    'SwinIR': swinir,
}
OFFICIAL = ['SPAN/spantiny_ch26_x4', 'DSCLoRA/DSCF_ch26_x4', 'LKDN/LKDN_x4', 'LKDN/LKDN-S_x4']


def photograph(height, width):
    return np.ascontiguousarray(data.astronaut()[100 : 100 + height, 150 : 150 + width])


def page(height, width):
    return np.repeat(data.page()[:height, :width, None], 3, 2)


def largest_difference(upscaler, image):
    """Tiles of the smallest size but a few pixels, against the whole image."""
    upscaler.tile = None
    whole = upscaler(image)
    upscaler.tile = smallest_tile(upscaler.overlap, upscaler.multiple) + 13
    assert min(image.shape[:2]) > upscaler.tile  # else nothing is cut
    return np.abs(upscaler(image).astype(int) - whole).max(), whole


@pytest.mark.parametrize('name', NETWORKS)
def test_tiled_equals_whole(name):
    torch.manual_seed(1)
    network = NETWORKS[name]().eval()
    difference, whole = largest_difference(Upscaler(network), photograph(151, 173))
    assert difference <= 1
    assert whole.std() > 5  # an image of one color would tell nothing


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_networks_tiled(shared, name):
    upscaler = Upscaler(load_network(shared / 'weights' / f'{name}.pth'))
    assert largest_difference(upscaler, photograph(91, 101))[0] <= 1
    assert largest_difference(upscaler, page(91, 91))[0] <= 1


@pytest.mark.parametrize(
    'name',
    [
        *('DRCT', 'MoESR', 'Swin2SR', 'SwinIR', 'SwinIR-unshuffle'),
        # Which take means over the image, too, and have windows or pad.
        *('DAT', 'HAT', 'KBNet-s', 'MixDehazeNet', 'NAFNet'),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('GRL', 'SwinIR-real-x2', 'SwinIR-real-x4')),
    ],
)
def test_tiles_of_networks_with_windows(tmp_path, name):
    """They stand on the windows, whether the network wants whole ones or pads images to them by itself."""
    torch.save(SMALL[name].state(), tmp_path / 'net.pth')
    upscaler, runs = Upscaler(load_network(tmp_path / 'net.pth')), []
    upscaler.network.register_forward_pre_hook(lambda *args: runs.append(args))
    upscaler.multiple  # noqa: B018
    assert len(runs) <= 40
    side = smallest_tile(upscaler.overlap, upscaler.multiple)
    assert largest_difference(upscaler, photograph(side + 24, side + 37))[0] <= 1


class Windows(nn.Module):
    """Takes the mean of each window; what is no whole window is padded at the end, as in many a transformer."""

    def __init__(self, height, width, takes_mean=False):
        super().__init__()
        self.sides, self.takes_mean = (height, width), takes_mean

    def forward(self, x):
        height, width = x.shape[2:]
        high, wide = (-(-length // side) * side for length, side in zip((height, width), self.sides))
        padded = nn.functional.pad(x, (0, wide - width, 0, high - height))
        means = nn.functional.avg_pool2d(padded, self.sides)
        means = means.repeat_interleave(self.sides[0], 2).repeat_interleave(self.sides[1], 3)
        result = x / 2 + means[:, :, :height, :width] / 2
        return result + x.mean((2, 3), keepdim=True) / 64 if self.takes_mean else result


@pytest.mark.parametrize('takes_mean', [False, True])
@pytest.mark.parametrize(
    'height, width', [(1, 1), (2, 2), (7, 7), (8, 8), (12, 12), (4, 10), (8, 32), (64, 1), (9, 18)]
)
def test_alignment_is_the_windows(height, width, takes_mean):
    runs = []
    network = Windows(height, width, takes_mean)
    network.register_forward_pre_hook(lambda *args: runs.append(args))
    assert find_alignment(network, NetworkInfo(3, 3, 1)) == (math.lcm(height, width), True)
    assert len(runs) <= 40


@pytest.mark.parametrize('multiple, window, expected', [(4, 8, 8), (8, 8, 8), (6, 4, 12), (50, 50, 50), (64, 64, 64)])
def test_alignment_beside_the_multiple_of_sizes(multiple, window, expected):
    found = find_alignment(Windows(window, window), NetworkInfo(3, 3, 1, multiple))
    assert found == (expected, True)


def test_no_alignment_is_told():
    """Of windows beyond 64 pixels, and of pixels that look at all others."""

    class Transposed(nn.Module):
        def forward(self, x):
            return x + x.flip(3)

    for network in (Windows(72, 72), Transposed()):
        assert not find_alignment(network, NetworkInfo(3, 3, 1)).is_exact
        assert Upscaler(nn.Sequential(nn.Identity(), network), tile=100).looks_everywhere


def test_less_overlap_would_show(shared):
    upscaler = Upscaler(load_network(shared / 'weights/SPAN/spantiny_ch26_x4.pth'))
    image = page(101, 111)
    whole = upscaler(image)
    upscaler._cut, upscaler.tile = Cut(3, 1, True), 36
    assert np.abs(upscaler(image).astype(int) - whole).max() > 1


def test_a_network_that_looks_at_the_whole_image():
    class Mean(nn.Module):
        def forward(self, x):
            return x - x.mean((2, 3), keepdim=True)

    assert radius(Mean()) is None
    torch.manual_seed(0)
    network = RCAN(3, 3, num_feat=16, num_group=2, num_block=2, squeeze_factor=4, upscale=2).eval()
    upscaler = Upscaler(network, tile=80)
    assert upscaler.looks_everywhere
    assert upscaler(photograph(90, 101)).shape == (180, 202, 3)


def test_smallest_tile_is_named():
    torch.manual_seed(0)
    for network, multiple in ((convolutions((5, 2)), 1), (swinir(), 4)):
        with pytest.raises(InputError, match='A tile of 3 is too small for ') as caught:
            Upscaler(network, tile=3)
        smallest, sensible = map(int, re.search(r'works is (\d+), and (\d+) or more', str(caught.value)).groups())
        assert sensible == 2 * smallest and smallest % multiple == 0
        Upscaler(network, tile=smallest)
        with pytest.raises(InputError, match='too small'):
            Upscaler(network, tile=smallest - 1)
    assert smallest_tile(5) == 11


def test_memory_of_the_widest_features():
    network = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 12, 3, padding=1), nn.PixelShuffle(2))
    assert bytes_per_pixel(network, torch.zeros(1, 3, 10, 20)) == 4 * 40 * 4
    upscaled = nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 32, 1), nn.Conv2d(32, 3, 1))
    assert bytes_per_pixel(upscaled, torch.zeros(1, 3, 10, 20)) == 4 * 32 * 4 * 4


def test_image_is_whole_where_memory_allows_and_tiled_where_not(monkeypatch):
    torch.manual_seed(0)
    upscaler = Upscaler(NETWORKS['SPAN']().eval())
    image = photograph(120, 130)
    seen = []
    whole = upscaler(image, lambda number, count: seen.append(count))
    assert seen == [1]
    side = 90
    free = 2 * upscaler._bytes_per_pixel * side**2
    monkeypatch.setattr('lora_sr.runtime.upscaler.free_memory', lambda device: free)
    assert largest_tile(upscaler._bytes_per_pixel, free / 2) == side
    tiled = upscaler(image, lambda number, count: seen.append(count))
    assert seen[1:] == [4] * 4
    assert np.abs(tiled.astype(int) - whole).max() <= 1
    monkeypatch.setattr('lora_sr.runtime.upscaler.free_memory', lambda device: 0)  # tiles that work, whatever happens
    assert np.abs(upscaler(image).astype(int) - whole).max() <= 1


def test_tiles_are_no_larger_than_pays(monkeypatch):
    """However much is free, but for networks of which tiles are another image."""
    upscaler = Upscaler(NETWORKS['SPAN']().eval())
    monkeypatch.setattr('lora_sr.runtime.upscaler.free_memory', lambda device: 1 << 40)
    monkeypatch.setattr('lora_sr.runtime.upscaler.ENOUGH_MEMORY', {'cpu': upscaler._bytes_per_pixel * 400**2})
    assert upscaler._tiling(400, 400)[0] > 400
    assert upscaler._tiling(401, 400)[0] == 400
    upscaler._cut = Cut(30, 1, True)  # as of a network that looks further
    assert upscaler._tiling(700, 700)[0] == 480
    upscaler._cut = Cut(32, 1, False)
    assert upscaler._tiling(4000, 6000)[0] > 6000


class Recording(nn.Sequential):
    """Notes the sizes that it runs with: those of images that were padded."""

    sizes: list[tuple[int, ...]] = []

    def forward(self, x):
        Recording.sizes.append(tuple(x.shape[2:]))
        return super().forward(x)


@pytest.mark.parametrize('size', [(20, 900), (900, 20), (150, 700), (300, 300)])
@pytest.mark.parametrize(
    'wishes', [{'is_square': True}, {'is_square': True, 'size_multiple': 8}, {'smallest': 120}, {'size_multiple': 16}]
)
def test_padding_counts(monkeypatch, wishes, size):
    """A network that wants squares, or large images, takes memory for what it gets, and not for what is given."""
    torch.manual_seed(0)
    network = Recording(*convolutions((1, 1), (2, 1)))
    set_info(network, NetworkInfo(3, 3, 1, **wishes))
    upscaler = Upscaler(take_any_size(network))
    image = np.tile(photograph(50, 70), (18, 13, 1))[: size[0], : size[1]]
    whole = upscaler(image)
    assert upscaler.overlap == 3
    enough = upscaler._bytes_per_pixel * 160**2
    monkeypatch.setattr('lora_sr.runtime.upscaler.ENOUGH_MEMORY', {'cpu': enough})
    Recording.sizes.clear()
    # What pads a square is next to the lower and right borders, or is not.
    inner = slice(-upscaler.overlap if 'is_square' in wishes else None)
    assert np.abs(upscaler(image).astype(int) - whole)[inner, inner].max() <= 1
    seen = [height * width for height, width in Recording.sizes]
    assert len(seen) > 1 and max(seen) <= 160**2
    if 'is_square' in wishes:
        assert all(height == width for height, width in Recording.sizes)
        # Of the image itself twice as much, and some overlaps.
        assert sum(seen) < 2.5 * max(min(size), 32) * max(size)


def test_tiles_are_no_smaller_than_a_network_takes(monkeypatch):
    network = Recording(*convolutions((1, 1)))
    set_info(network, NetworkInfo(3, 3, 1, smallest=120))
    upscaler = Upscaler(take_any_size(network))
    assert upscaler.overlap == 1
    monkeypatch.setattr('lora_sr.runtime.upscaler.free_memory', lambda device: 0)
    Recording.sizes.clear()
    upscaler(photograph(240, 230))
    assert set(Recording.sizes) == {(120, 120)} and len(Recording.sizes) == 3 * 2


def test_files_that_were_read_do_not_fill_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, 'CGROUP', tmp_path)
    (tmp_path / 'memory.max').write_text('9000000\n')
    (tmp_path / 'memory.current').write_text('8500000\n')
    (tmp_path / 'memory.stat').write_text('anon 100\nfile 7000000\ninactive_file 6000000\nactive_file 900000\n')
    assert free_memory(torch.device('cpu')) == 6500000
    (tmp_path / 'memory.max').write_text('max\n')
    assert free_memory(torch.device('cpu')) > 9000000


def test_free_memory_of_mps(monkeypatch):
    """What Metal recommends and is not taken, and no more than a tensor of 4 GiB lets a network use."""
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 3 << 30)
    for recommended, expected in ((11 << 30, 8 << 30), (1 << 30, 0), (96 << 30, 16 << 30)):
        monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda size=recommended: size)
        assert free_memory(torch.device('mps')) == expected


def test_free_memory_is_that_of_this_machine():
    assert 1 << 20 < free_memory(torch.device('cpu')) < 1 << 50
