"""The camera degradation against its steps written out with SciPy and Pillow, and the command that applies it."""

import hashlib
import io
import math
import os

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr
from PIL import Image
from scipy import ndimage

from lora_sr.cli.main import main
from lora_sr.data import camera, prepare_databases, read_meta_info
from lora_sr.data.camera import CameraRanges, camera_degradation, camera_seed
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale, bicubic_upscale

SHARP = {'blur_sigma': (1e-3, 1e-3)}
QUIET = {'shot_gain': (1e-12, 1e-12), 'read_sigma': (1e-9, 1e-9)}
FINE = {'jpeg_quality': (100, 100)}


@pytest.fixture
def no_jpeg(monkeypatch):
    monkeypatch.setattr(camera, '_jpeg', lambda image, quality: image)


def photo(height, width, number=1):
    noise = np.random.RandomState(number).randint(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def matrix(length, scale):
    """MATLAB's antialiased bicubic as a matrix."""
    rows = np.zeros((length // scale, length))
    for i in range(length // scale):
        center = scale * (i + 0.5) - 0.5
        for j in range(math.floor(center - 2 * scale), math.ceil(center + 2 * scale) + 1):
            x = abs(j - center) / scale
            weight = 1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0
            if 0 <= j < length:
                rows[i, j] = weight / scale
    return rows


def reference(image, scale, name, seed):
    """The module's description, step by step, with other tools."""
    key = int.from_bytes(hashlib.sha256(f'{seed} {name}'.encode()).digest()[:16], 'big')
    height, width = image.shape[0] // scale, image.shape[1] // scale
    pairs = (height * width * 3 + 1) // 2
    draws = [int(word) / 2**64 for word in np.random.Philox(key=key).random_raw(6 + 2 * pairs)]
    first, second = ((0.2 + 0.3 * draw) * scale for draw in draws[:2])
    angle = np.pi * draws[2]
    gain, read = (10 ** (-4 + draw) for draw in draws[3:5])
    quality = 80 + math.floor(16 * draws[5])

    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    precision = turn.T @ np.diag([first**-2, second**-2]) @ turn
    radius = math.ceil(3 * max(first, second))
    x, y = np.meshgrid(*[np.arange(-radius, radius + 1)] * 2)
    points = np.stack([x, y], -1)
    kernel = np.exp(-np.einsum('...i,ij,...j', points, precision, points) / 2)
    kernel /= kernel.sum()
    mirrored = np.pad(image / 255, [(10 * scale,) * 2] * 2 + [(0, 0)], 'symmetric')
    planes = [ndimage.correlate(mirrored[..., c], kernel) for c in range(3)]
    small = np.stack([matrix(len(p), scale) @ p @ matrix(p.shape[1], scale).T for p in planes], -1).clip(0, 1)
    small = small[10:-10, 10:-10]

    linear = np.where(small <= 0.04045, small / 12.92, ((small + 0.055) / 1.055) ** 2.4)
    one, two = np.array(draws[6 : 6 + pairs]), np.array(draws[6 + pairs :])
    normal = np.sqrt(-2 * np.log1p(-one)) * np.exp(2j * np.pi * two)
    normal = np.concatenate([normal.real, normal.imag])[: small.size].reshape(small.shape)
    linear = (linear + normal * np.sqrt(gain * linear + read**2)).clip(0, 1)
    small = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    file = io.BytesIO()
    Image.fromarray(np.rint(255 * small[..., ::-1]).astype(np.uint8)).save(
        file, 'JPEG', quality=quality, subsampling='4:2:0'
    )
    return np.asarray(Image.open(file))[..., ::-1]


@pytest.mark.parametrize(
    'scale, shape, name, seed',
    [(4, (64, 92), 'a', 0), (4, (60, 44), 'img_001', 3), (3, (75, 63), 'b', 0), (2, (50, 38), 'c', 1)],
)
def test_equals_its_steps_written_out(scale, shape, name, seed):
    image = photo(*shape)
    result = camera_degradation(image, scale, camera_seed(name, seed))
    assert result.dtype == np.uint8 and result.shape == (shape[0] // scale, shape[1] // scale, 3)
    np.testing.assert_array_equal(result, reference(image, scale, name, seed))


def test_16_bits_count():
    """An image of 8 bits that is stored in 16 gives the same; what lies between two levels of 8 bits tells."""
    small, (height, width) = photo(64, 92), (64, 92)
    wide = 257 * small.astype(np.uint16)
    seed = camera_seed('a')
    np.testing.assert_array_equal(camera_degradation(wide, 4, seed), camera_degradation(small, 4, seed))
    image = (wide.clip(0, 65000) + np.random.default_rng(0).integers(0, 257, (height, width, 3))).astype(np.uint16)
    result = camera_degradation(image, 4, seed)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, reference(image / 257, 4, 'a', 0))
    assert (result != camera_degradation((image >> 8).astype(np.uint8), 4, seed)).any()


def test_command_on_16_bits(tmp_path):
    image = 65 * photo(64, 92).astype(np.uint16)
    for suffix in ('png', 'tif'):
        (tmp_path / suffix).mkdir()
        cv2.imwrite(f'{tmp_path}/{suffix}/a.{suffix}', image)
        assert main(['degrade', f'{tmp_path}/{suffix}', '-o', f'{tmp_path}/lr_{suffix}', '--scale', '4']) == 0
        written = cv2.imread(f'{tmp_path}/lr_{suffix}/a.png', cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(written, camera_degradation(image, 4, camera_seed('a')))


def test_the_random_bits_are_pinned():
    # SHA-256 and Philox give these everywhere; if one of them changes, so does every published test set.
    assert camera_seed('img_001') == 215146179827589397635674405227092019543
    assert camera_seed('img_001', 1) != camera_seed('img_001') != camera_seed('img_002')
    assert camera_seed('caf\u00e9') == camera_seed('cafe\u0301')
    assert np.random.Philox(key=camera_seed('img_001')).random_raw(2).tolist() == [
        13229522131031218725,
        14817017094179158965,
    ]


def test_pixels_lie_where_those_of_bicubic_lie(no_jpeg):
    image = cv2.GaussianBlur(photo(128, 96), (0, 0), 3)
    for scale in (2, 3, 4):
        image = image[: 96 // scale * scale, : 96 // scale * scale]
        sharp = camera_degradation(image, scale, 1, CameraRanges(**SHARP, **QUIET, **FINE))
        assert np.abs(sharp.astype(int) - bicubic_downscale(image, scale, 'mirror')).max() <= 1
    # A blurred spot stays in its place: the center of LR pixel i is at HR pixel 4 i + 1.5.
    y, x = np.mgrid[:128, :128]
    spot = np.rint(250 * np.exp(-((y - 50.25) ** 2 + (x - 71.5) ** 2) / 200)).astype(np.uint8)
    small = camera_degradation(cv2.merge([spot] * 3), 4, 1, CameraRanges(**QUIET, **FINE))[..., 0].astype(float)
    y, x = np.mgrid[:32, :32]
    assert 4 * (y * small).sum() / small.sum() + 1.5 == pytest.approx(50.25, abs=0.02)
    assert 4 * (x * small).sum() / small.sum() + 1.5 == pytest.approx(71.5, abs=0.02)


def test_noise_has_the_variance_that_the_ranges_say(no_jpeg):
    ranges = CameraRanges(shot_gain=(1e-3, 1e-3), read_sigma=(4e-3, 4e-3))
    for level in (60, 120, 200):
        noisy = camera_degradation(np.full((400, 400, 3), level, np.uint8), 2, level, ranges) / 255
        light = ((noisy + 0.055) / 1.055) ** 2.4
        signal = ((level / 255 + 0.055) / 1.055) ** 2.4
        assert light.mean() == pytest.approx(signal, rel=0.005)
        assert light.var() == pytest.approx(1e-3 * signal + 4e-3**2, rel=0.03)


def test_wrong_arguments():
    image = photo(48, 48)
    for wrong, scale, part in (
        (image, 1, 'from 2 to 16, got 1.'),
        (image, 17, 'from 2 to 16, got 17.'),
        (photo(48, 60), 5, r'must be multiples of the scale 5, got 60 x 48 pixels \(width x height\).'),
        (image[..., 0], 4, r'got uint8 of shape \(48, 48\)'),
        (image / 255, 4, 'got float64'),
    ):
        with pytest.raises(InputError, match=part):
            camera_degradation(wrong, scale, 0)


def degrade(*arguments):
    return main(['degrade', *map(str, arguments)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_command_gives_the_same_whatever_the_workers_order_and_company(tmp_path, make_images, capsys):
    names = ['one', 'two', 'three']
    hr = make_images(tmp_path / 'hr', [(61, 50), (48, 48), (90, 70)], names)
    alone = make_images(tmp_path / 'alone', [(61, 50)], names)
    for output, *options in (('a', '--workers', 1), ('b', '--workers', 3), ('c', '--seed', 1)):
        assert degrade(hr, '-o', tmp_path / output, '--scale', 4, *options) == 0
    assert 'a: 3 images at scale 4' in capsys.readouterr().out
    assert degrade(alone, '-o', tmp_path / 'd', '--scale', 4) == 0
    made = contents(tmp_path / 'a')
    assert set(made) == {'one.png', 'two.png', 'three.png'}
    assert contents(tmp_path / 'b') == made
    assert contents(tmp_path / 'd') == {'one.png': made['one.png']}
    assert not set(contents(tmp_path / 'c').values()) & set(made.values())
    image = cv2.imread(str(hr / 'one.png'))[:60, :48]
    np.testing.assert_array_equal(
        cv2.imread(str(tmp_path / 'a' / 'one.png')), camera_degradation(image, 4, camera_seed('one'))
    )


def test_prepare_pairs_what_degrade_makes(tmp_path, make_images):
    hr = make_images(tmp_path / 'hr', [(61, 50), (48, 63)], suffix='.jpg')
    assert degrade(hr, '-o', tmp_path / 'lr', '--scale', 4) == 0
    databases = prepare_databases([hr], tmp_path / 'out', (4,), [tmp_path / 'lr'], size=0).databases
    assert read_meta_info(databases[1]) == {'0001': (60, 48, 3), '0002': (48, 60, 3)}
    assert read_meta_info(databases[4]) == {'0001': (15, 12, 3), '0002': (12, 15, 3)}


def test_command_with_wrong_input(tmp_path, make_images, capsys):
    hr = make_images(tmp_path / 'hr', [(48, 48), (48, 48)])
    made = tmp_path / 'made'

    def refused(*arguments):
        assert degrade(*arguments) == 2
        assert not (tmp_path / 'out').exists()
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and err.endswith('.\n')
        return err

    out = ('-o', tmp_path / 'out')
    assert '--scale must be a whole number from 2 to 16, got 1.' in refused(hr, *out, '--scale', 1)
    assert '--workers must be a whole number of at least 1, got 0.' in refused(hr, *out, '--scale', 4, '--workers', 0)
    assert 'missing is not a folder' in refused(tmp_path / 'missing', *out, '--scale', 4)
    assert 'The output must be another folder than that of the HR images' in refused(
        hr, '-o', f'{hr}/../hr', '--scale', 4
    )
    assert degrade(hr, '-o', made, '--scale', 4) == 0
    before = contents(made)
    assert '.png exists and is not the image that is made here' in refused(hr, '-o', made, '--scale', 4, '--seed', 1)
    assert contents(made) == before
    (hr / '0002.png').write_bytes((hr / '0002.png').read_bytes()[:-20])
    for output in (tmp_path / 'out', made):
        assert '0002.png is damaged' in refused(hr, '-o', output, '--scale', 4, '--overwrite')
    assert contents(made) == before
    cv2.imwrite(str(hr / '0002.png'), np.zeros((3, 9, 3), np.uint8))
    assert '0002.png must have at least 4 pixels each way, got 9 x 3 (width x height).' in refused(
        hr, *out, '--scale', 4
    )
    cv2.imwrite(str(hr / '0002.png'), photo(48, 48))
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    for name, kind in (('file', 'a file'), ('link', 'a link that leads nowhere')):
        sentence = f'The output {tmp_path / name} must be a folder, got {kind}.'
        assert sentence in refused(hr, '-o', tmp_path / name, '--scale', 4, '--overwrite')
    assert (tmp_path / 'file').read_text() == 'mine' and not (tmp_path / 'nowhere').exists()
    assert degrade(hr, '-o', made, '--scale', 4, '--overwrite') == 0
    after = contents(made)
    assert set(after) == set(before)
    assert [after[name] == before[name] for name in ('0001.png', '0002.png')] == [True, False]


def test_all_broken_images_are_named(tmp_path, make_images, capsys):
    hr = make_images(tmp_path / 'hr', [(48, 48)] * 8 + [(2, 9)])
    for number in range(2, 9):
        (hr / f'000{number}.png').write_bytes(b'no image')
    assert degrade(hr, '-o', tmp_path / 'out', '--scale', 4) == 2
    err = capsys.readouterr().err
    assert err.startswith('lora-sr: error: 8 of 9 images cannot be used, which --skip-broken leaves out:\n')
    assert [name for name in range(1, 10) if f'\n  {hr}/000{name}.png' in err] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert err.endswith('.\n') and len(err.splitlines()) == 9
    assert not (tmp_path / 'out').exists()


def test_skip_broken_makes_what_the_others_alone_give(tmp_path, make_images, capsys):
    hr = make_images(tmp_path / 'hr', [(48, 48), (48, 52), (3, 48), (52, 48)])
    good = make_images(tmp_path / 'good', [(48, 48), (48, 52), (3, 48), (52, 48)])
    for number in ('0001', '0003'):
        (good / f'{number}.png').unlink()
    assert degrade(good, '-o', tmp_path / 'wanted', '--scale', 4) == 0
    (hr / '0001.png').write_bytes((hr / '0001.png').read_bytes()[:-20])
    made, wanted = tmp_path / 'made', contents(tmp_path / 'wanted')
    # The second run goes on after one that was killed while images came into their places.
    for _ in range(2):
        capsys.readouterr()
        assert degrade(hr, '-o', made, '--scale', 4, '--skip-broken') == 0
        out, err = capsys.readouterr()
        assert out == f'{made}: 2 images at scale 4\n'
        assert err.startswith('lora-sr: note: 2 of 4 images left out:') and err.count('\n') == 3
        assert f'{hr}/0001.png is damaged' in err and f'{hr}/0003.png must have at least 4 pixels each way' in err
        assert contents(made) == wanted and sorted(wanted) == ['0002.png', '0004.png']
        (made / '0004.png').unlink()
    assert degrade(hr, '-o', made, '--scale', 4) == 2
    assert list(contents(made)) == ['0002.png']
    for number in ('0002', '0004'):
        (hr / f'{number}.png').write_bytes(b'')
    capsys.readouterr()
    assert degrade(hr, '-o', tmp_path / 'none', '--scale', 4, '--skip-broken') == 2
    assert capsys.readouterr().err.startswith('lora-sr: error: 4 of 4 images cannot be used:')
    assert not (tmp_path / 'none').exists()


def test_too_little_memory_is_told_in_one_sentence(tmp_path, make_images, capsys, monkeypatch):
    hr = make_images(tmp_path / 'hr', [(48, 48)])
    monkeypatch.setattr('lora_sr.data.degrade.camera_degradation', lambda *_: (_ for _ in ()).throw(MemoryError))
    assert degrade(hr, '-o', tmp_path / 'out', '--scale', 4) == 2
    assert capsys.readouterr().err.endswith(f': {hr}/0001.png needs more memory than there is.\n')


def test_names_that_are_no_text(tmp_path, make_images):
    hr = tmp_path / 'hr\udcff'
    try:
        os.rename(make_images(tmp_path / 'hr', [(48, 48)]), hr)
        os.rename(hr / '0001.png', hr / 'a\udcfe.png')
    except OSError:
        pytest.skip('this file system has no such names')
    assert degrade(hr, '-o', tmp_path / 'out\udcff', '--scale', 4) == 0
    assert [path.name for path in (tmp_path / 'out\udcff').iterdir()] == ['a\udcfe.png']


def test_a_killed_run_goes_on(tmp_path, make_images):
    hr = make_images(tmp_path / 'hr', [(48, 48), (48, 52), (52, 48)])
    made = tmp_path / 'made'
    assert degrade(hr, '-o', made, '--scale', 4) == 0
    whole = contents(made)
    # Killed while images came into their places.
    (made / '0002.png').unlink()
    (made / f'.degrade.{"0" * 16}.partial').mkdir()
    (made / f'.degrade.{"0" * 16}.partial' / '0002.png').write_bytes(whole['0002.png'][:9])
    kept = (made / '0001.png').stat()
    assert degrade(hr, '-o', made, '--scale', 4) == 0
    assert contents(made) == whole and (made / '0001.png').stat().st_ino == kept.st_ino


def test_a_published_set_is_the_same_on_this_machine(benchmark_set):
    values = []
    for path in sorted((benchmark_set('Set5') / 'GTmod4').iterdir()):
        image = cv2.imread(str(path))
        result = bicubic_upscale(camera_degradation(image, 4, camera_seed(path.stem)), 4)
        values.append(calculate_psnr(result, image, crop_border=4, test_y_channel=True))
    assert np.mean(values) == pytest.approx(26.673, abs=0.001)  # clean: 28.42
