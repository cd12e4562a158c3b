"""Images of a report, before and after, and their attribution maps: chosen by rule, and worked out by ourselves."""

import base64
import re

import cv2
import numpy as np
import pytest
import torch
from report_pages import report_on
from tiny_adaptation import write_adaptation

from lora_sr.archs.span import SPAN
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.images.luma import psnr
from lora_sr.report.attribution import attribution_map, diffusion_index
from lora_sr.report.crops import CROP, BeforeAfter, choose, look_at_each
from lora_sr.runtime import Upscaler
from lora_sr.runtime.pixels import image_to_tensor

LOOKS = 'What the networks look at'


def test_crops_are_chosen_by_rule(adapted, tmp_path):
    """PSNR of each pair, and the two ends of its gain, worked out by ourselves."""
    from lora_sr import load_network

    networks = [Upscaler(load_network(adapted / name)) for name in ('base.pth', 'merged.pth')]
    found = {}
    for file in sorted((adapted / 'data/held/HR').iterdir()):
        hr, lr = cv2.imread(str(file)), cv2.imread(str(adapted / 'data/held/LR' / file.name))
        found[file.stem] = [psnr(run(lr[:, :, ::-1].copy())[:, :, ::-1].copy(), hr, 2) for run in networks]
    ranked = sorted(found, key=lambda name: found[name][0] - found[name][1])
    page = report_on(adapted, tmp_path / 'r.html')
    shown = re.findall(r'(\d\d): ([+-]\d+\.\d\d) dB (\d+\.\d\d) dB before, (\d+\.\d\d) dB after', page.text)
    assert [name for name, *_ in shown] == [*ranked[:2], *ranked[-2:]]
    for name, gain, before, after in shown:
        assert (before, after) == tuple(f'{one:.2f}' for one in found[name])
        assert gain == f'{found[name][1] - found[name][0]:+.2f}'


def test_a_crop_is_where_the_networks_differ_most(adapted):
    from lora_sr import load_network

    networks = [load_network(adapted / name) for name in ('base.pth', 'merged.pth')]
    for pair in look_at_each(adapted / 'data/held', *networks):
        crop, file = pair.crop, f'{pair.name}.png'
        assert crop.hr.shape == (CROP[1], CROP[0], 3) and crop.lr.shape == (CROP[1] // 2, CROP[0] // 2, 3)
        hr, lr = (cv2.imread(str(adapted / 'data/held' / kind / file)) for kind in ('HR', 'LR'))
        assert np.array_equal(hr[crop.top :, crop.left :][: CROP[1], : CROP[0]], crop.hr)
        assert np.array_equal(lr[crop.top // 2 :, crop.left // 2 :][: CROP[1] // 2, : CROP[0] // 2], crop.lr)
        one, other = (Upscaler(network)(lr[:, :, ::-1].copy())[:, :, ::-1] for network in networks)
        y = (one.astype(float) - other) @ (24.966, 128.553, 65.481)
        sums = {
            (top, left): np.square(y[top : top + CROP[1], left : left + CROP[0]]).sum()
            for top in range(2, 90 - 2 - CROP[1] + 1, 2)
            for left in range(2, 120 - 2 - CROP[0] + 1, 2)
        }
        assert sums[crop.top, crop.left] == pytest.approx(max(sums.values()), rel=1e-4)


@pytest.mark.parametrize(('held', 'shown'), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4)])
def test_no_pair_is_shown_twice(held, shown):
    pairs = [BeforeAfter(str(number), 20.0, 20.0 + number, None) for number in range(held)]
    most, least = choose(pairs)
    names = [pair.name for pair in (*most, *least)]
    assert len(set(names)) == len(names) == shown and names[0] == str(held - 1)
    assert names[-1] == '0' and [int(name) for name in names] == sorted(map(int, names), reverse=True)


def test_pairs_that_cannot_be_better():
    """Of equal infinite PSNR; a gain that is no number would be in no order."""
    pair = BeforeAfter('a', float('inf'), float('inf'), None)
    assert pair.gain == 0 and choose([pair]) == ([pair], [])


def write_pair(folder, name, hr):
    cv2.imwrite(str(folder / 'data/held/HR' / f'{name}.png'), hr)
    cv2.imwrite(str(folder / 'data/held/LR' / f'{name}.png'), bicubic_downscale(hr, 2))


def test_attribution_maps_before_and_after(tmp_path):
    """Of the two pairs at the ends of the gain, worked out by ourselves; their images are larger than what is shown."""
    from lora_sr import load_network

    folder = write_adaptation(tmp_path / 'phone', held=3)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        write_pair(folder, f'{number:02d}', cv2.resize(noise, (240, 160), interpolation=cv2.INTER_CUBIC))
    page = report_on(folder, tmp_path / 'r.html')
    place = page.text.index(LOOKS)
    alts = {attributes['alt']: attributes['src'] for attributes in page.of('img')}
    networks = [load_network(folder / name) for name in ('base.pth', 'merged.pth')]
    least, middle, most = sorted(look_at_each(folder / 'data/held', *networks), key=lambda pair: pair.gain)
    assert f'{middle.name}, most improved' not in page.text and f'{middle.name}, least improved' not in page.text
    for pair, which in ((most, 'most'), (least, 'least')):
        told = page.text[page.text.index(f'{pair.name}, {which} improved', place) :]
        before, after = pair.crop.before.astype(int), pair.crop.after.astype(int)
        difference = np.abs(before - after).sum(2)
        windows = [(top, left) for top in range(CROP[1] - 15) for left in range(CROP[0] - 15)]
        top, left = max(windows, key=lambda at: difference[at[0] : at[0] + 16, at[1] : at[1] + 16].sum())
        x, y = pair.crop.left + left, pair.crop.top + top
        assert f'has the pixels {x} to {x + 15} across and {y} to {y + 15} down of the output' in told
        # 64 LR pixels around its middle, as far as the image goes.
        lr = cv2.imread(str(folder / 'data/held/LR' / f'{pair.name}.png'))
        column, row = (min(max(round((at + 8) / 2 - 32), 0), side - 64) for at, side in ((x, 120), (y, 80)))
        part = np.ascontiguousarray(lr[row : row + 64, column : column + 64])
        assert told.partition('. ')[0].endswith(
            f'LR pixels {column} to {column + 63} across and {row} to {row + 63} down'
        )
        inner = x - 2 * column, y - 2 * row, 16
        for kind, network in zip(('Before', 'After'), networks):
            index = diffusion_index(attribution_map(network, image_to_tensor(part), inner, 10))
            assert f'{kind}: diffusion index {index:.2f}' in told
            assert f'{kind}, pair {pair.name}: diffusion index {index:.2f}' in alts
        data = alts[f'LR image, pair {pair.name}: the patch in the frame'].partition(',')[2]
        pixels = np.frombuffer(base64.b64decode(data), np.uint8)
        assert np.array_equal(cv2.imdecode(pixels, cv2.IMREAD_COLOR), part)


def test_a_single_pair_has_its_attribution_maps(tmp_path):
    page = report_on(write_adaptation(tmp_path / 'phone', held=1), tmp_path / 'r.html')
    assert '00, most improved' in page.text and 'least improved Shown' not in page.text
    assert len(page.of('img')) == 4 + 3


def test_maps_of_large_networks_are_left_to_their_command(tmp_path, monkeypatch):
    folder = write_adaptation(tmp_path / 'phone', held=1)
    monkeypatch.setattr('lora_sr.report.looks.MOST_PARAMETERS', 100)
    page = report_on(folder, tmp_path / 'r.html')
    assert re.search(r'There are no attribution maps, which take long for a network of [\d,]+ parameters', page.text)
    assert len(page.of('img')) == 4


def test_why_there_are_no_attribution_maps(tmp_path):
    """A network for gray images upscales, channel by channel, and is not attributed; nor is an image without detail."""
    folder = write_adaptation(tmp_path / 'phone', held=2)
    write_pair(folder, '00', np.full((90, 120, 3), 90, np.uint8))
    page = report_on(folder, tmp_path / 'r.html')
    assert 'There are no attribution maps of this pair. The window must show what depends on details' in page.text
    assert re.search('01, (most|least) improved Shown are', page.text) and len(page.of('img')) == 2 * 4 + 3
    torch.manual_seed(0)
    gray = SPAN(1, 1, deploy=True, feature_channels=6, upscale=2)
    for name in ('base.pth', 'merged.pth'):
        torch.save({'params': gray.state_dict()}, folder / name)
    page = report_on(folder, tmp_path / 'r.html')
    assert 'There are no attribution maps. "The network before" must take and give RGB images' in page.text
    assert len(page.of('img')) == 2 * 4
