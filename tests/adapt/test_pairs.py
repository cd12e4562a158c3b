"""Pairs as users bring them: what is wrong with some is told, and what is wrong with all."""

import math

import cv2
import numpy as np
import pytest
from scenes import scene, taken

from lora_sr.adapt import pairs as pairs_module
from lora_sr.adapt.pairs import look_at_pairs, write_training_pairs
from lora_sr.data.lmdb_store import RawDatabase
from lora_sr.errors import InputError


def moved(image, x=0, y=0):
    return np.roll(image, (y, x), (0, 1))


def put(folder, name, image):
    assert cv2.imwrite(str(folder / f'{name}.png'), image)


def test_good_pairs(camera):
    found = look_at_pairs(*camera(24), 2)
    assert len(found.used) == 24 and not found.left_out and not found.notes
    assert max(map(abs, found.shift)) < 0.05 and found.color < 5
    train, held = found.split()
    assert [pair.name for pair in held] == ['04', '12', '20']  # 3 of 24, evenly spread
    assert sorted(pair.name for pair in (*train, *held)) == [pair.name for pair in found.used]


@pytest.mark.parametrize(('count', 'held'), [(2, 1), (3, 1), (10, 1), (11, 2), (45, 5), (180, 10)])
def test_a_tenth_is_held_back(count, held):
    pairs = pairs_module.Pairs(tuple(range(count)), {}, (0, 0), 0, ())
    train, back = pairs.split()
    assert len(back) == held and set(train) | set(back) == set(range(count)) and not set(train) & set(back)


def test_each_that_cannot_be_used_is_named(camera):
    hr, lr = camera(12)
    (lr / '00.png').write_bytes(b'not an image')
    (lr / '01.png').unlink()
    put(lr, '02', taken(scene(90)))  # of another scene
    put(lr, '03', taken(moved(scene(3), 8, 2)))
    put(lr, '04', taken(scene(4))[:40])
    for folder, size in ((hr, 40), (lr, 20)):
        put(folder, '05', scene(5, size, size))
    found = look_at_pairs(hr, lr, 2)
    assert [pair.name for pair in found.used] == ['06', '07', '08', '09', '10', '11']
    reasons = {path.rpartition('/')[2]: reason for path, reason in found.left_out.items()}
    for name, words in {
        '00.png': f'{lr}/00.png is damaged',
        '01.png': '01.png',
        '02.png': f'{lr}/02.png must show what {hr}/02.png shows, got a correlation of ',
        '03.png': 'must lie on',
        '04.png': f'{lr}/04.png must have 72 x 64 pixels',
        '05.png': f'{lr}/05.png must have at least 24 pixels each way, got 20 x 20.',
    }.items():
        assert words in reasons[name]
    assert 'a shift of (4.0, 1.0) LR pixels, where most have (' in reasons['03.png']
    assert found.notes == ('6 pairs are few: what is learned of them may not hold for other images.',)


def test_sizes_that_differ_by_a_pixel(camera):
    hr, lr = camera(12)
    put(hr, '03', scene(3)[:-1, :-3])
    put(lr, '04', taken(scene(4))[:-1])
    found = look_at_pairs(hr, lr, 2)
    sizes = {pair.name: (pair.size, pair.is_trimmed) for pair in found.used}
    assert sizes['03'] == ((70, 63), True) and sizes['04'] == ((72, 63), True) and sizes['05'] == ((72, 64), False)
    assert found.notes == ('2 of 12 pairs differ in size by a pixel or two, which go at the right and at the bottom.',)
    images = found.used[3].read(2, False)
    assert [image.shape for image in images] == [(126, 140, 3), (63, 70, 3)]


def test_all_are_shifted(camera):
    folders = camera(12, lambda hr: taken(moved(hr, 6)))
    found = look_at_pairs(*folders, 2)
    assert found.notes == (
        'LR is shifted by (3.0, 0.0) LR pixels, which the network would learn: --align undoes that.',
    )
    assert not look_at_pairs(*folders, 2, aligns=True).notes
    hr, lr = found.used[0].read(2, True)
    again = pairs_module.register(hr, lr, 2)
    assert math.hypot(*again.shift) < 0.3 and hr.shape[0] == 2 * lr.shape[0]


def test_colors_are_off(camera):
    folders = camera(12, lambda hr: np.uint8(taken(hr) * 0.8 + 10))
    (note,) = look_at_pairs(*folders, 2).notes
    assert note.startswith('Colors differ by ') and note.endswith('--align gives HR the colors of LR.')
    assert not look_at_pairs(*folders, 2, is_captured=False).notes
    pair = look_at_pairs(*folders, 2, aligns=True).used[0]
    apart = {}
    for aligns in (False, True):
        hr, lr = pair.read(2, aligns)
        apart[aligns] = np.abs(taken(hr).astype(float) - lr).max()
    assert apart[False] > 30 and apart[True] <= 3


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda hr: cv2.resize(hr, None, fx=2, fy=2), 'the larger one: HR and LR are the wrong way round'),
        (lambda hr: hr, 'the same size: the network makes images larger'),
        (lambda hr: taken(hr, 4), 'they are a pair for x4, and the network is for x2'),
    ],
    ids=['swapped', 'same', 'another scale'],
)
def test_what_is_wrong_with_all(camera, make, words):
    with pytest.raises(InputError) as error:
        look_at_pairs(*camera(3, make), 2)
    told = str(error.value)
    assert told.count(words) == 1 and told.endswith(f'{words}. It is the same with all 3 pairs.')


def test_several_mistakes_are_named_each(camera):
    hr, lr = camera(3, lambda hr: hr)
    (lr / '01.png').write_bytes(b'not an image')
    with pytest.raises(InputError) as error:
        look_at_pairs(hr, lr, 2)
    told = str(error.value)
    assert told.startswith('3 of 3 images cannot be used:') and told.count('the same size') == 2
    assert f'{lr}/01.png is damaged' in told


def test_one_pair_is_too_few(camera):
    with pytest.raises(InputError, match='at least 2 images, one of them to hold back, got 1'):
        look_at_pairs(*camera(1), 2)


def test_many_pairs_are_used_evenly(camera, monkeypatch):
    monkeypatch.setattr(pairs_module, 'MOST_PAIRS', 6)
    found = look_at_pairs(*camera(12), 2)
    assert [pair.name for pair in found.used] == ['00', '02', '04', '06', '08', '10']
    assert found.notes[0] == '6 pairs of 12 are used, evenly spread: a short run draws no more of them.'
    monkeypatch.setattr(pairs_module, 'MOST_PIXELS', 3 * 128 * 144)
    assert [pair.name for pair in look_at_pairs(found.used[0].hr.parent, found.used[0].lr.parent, 2).used] == [
        '00',
        '04',
        '08',
    ]


def test_what_training_reads(camera, tmp_path):
    found = look_at_pairs(*camera(3), 2)
    paths = write_training_pairs(found.used, tmp_path, 2, False)
    for path, file in zip(paths, (found.used[1].hr, found.used[1].lr)):
        image = cv2.imread(str(file))[:, :, ::-1]
        assert np.array_equal(RawDatabase(path).view('01')[:, :], image)
