"""Databases made from folders: their contents, and what is left after an interruption at any moment."""

import os
import shutil
import subprocess
import sys
import zlib

import cv2
import lmdb
import numpy as np
import pytest

import lora_sr.data.prepare as prepare_module
from lora_sr.data import bicubic_downscale, prepare_databases, read_meta_info
from lora_sr.data.cutting import subimage_starts
from lora_sr.data.degrade import degrade_folder
from lora_sr.data.lmdb_store import LmdbWriter, RawDatabase, check_databases
from lora_sr.data.placing import COMPLETE_FILE, PARTIAL_FOLDER, REPLACED_FOLDER, partial_folder
from lora_sr.errors import InputError
from lora_sr.images.png import encode_png

SMALL = dict(size=48, step=24, progress=False)


def contents(path):
    """{key: PNG bytes} and the lines of the meta file."""
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor()), (path / 'meta_info.txt').read_text()


def decode(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def basicsr_starts(length, size, step, threshold):
    """The lines of extract_subimages.py."""
    space = np.arange(0, length - size + 1, step)
    if length - (space[-1] + size) > threshold:
        space = np.append(space, length - size)
    return list(space)


@pytest.mark.parametrize('size, step, threshold', [(480, 240, 0), (48, 24, 0), (48, 24, 12), (48, 60, 0), (1, 1, 0)])
def test_grid_is_basicsrs(size, step, threshold):
    for length in (*range(size, size + 200), 2040, 1356):
        assert subimage_starts(length, size, step, threshold) == basicsr_starts(length, size, step, threshold)


def test_sub_images_are_cut_from_the_whole_image_and_its_bicubic_lr(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(101, 75), (60, 130)])
    prepared = prepare_databases([folder], tmp_path / 'out', [2, 3, 4], **SMALL)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'HR_sub.lmdb',
        'LR_bicubic_X2_sub.lmdb',
        'LR_bicubic_X3_sub.lmdb',
        'LR_bicubic_X4_sub.lmdb',
    ]
    expected = {scale: {} for scale in (1, 2, 3, 4)}
    for name in ('0001', '0002'):
        image = cv2.imread(str(folder / f'{name}.png'))
        image = image[: image.shape[0] // 12 * 12, : image.shape[1] // 12 * 12]
        index = 0
        for top in basicsr_starts(image.shape[0], 48, 24, 0):
            for left in basicsr_starts(image.shape[1], 48, 24, 0):
                index += 1
                for k in expected:
                    lr = bicubic_downscale(image, k)
                    expected[k][f'{name}_s{index:03d}'] = lr[top // k : (top + 48) // k, left // k : (left + 48) // k]
    for scale, images in expected.items():
        values, meta = contents(prepared.databases[scale])
        side = 48 // scale
        assert meta == ''.join(f'{key}.png ({side},{side},3) 1\n' for key in images)
        assert sorted(values) == sorted(key.encode() for key in images)
        for key, image in images.items():
            np.testing.assert_array_equal(decode(values[key.encode()]), image)
    assert (prepared.images, prepared.entries, prepared.smallest) == (2, len(expected[1]), (48, 48))


def test_basicsr_reads_the_pair(tmp_path, make_images):
    from basicsr.data.data_util import paired_paths_from_lmdb
    from basicsr.utils import FileClient, imfrombytes

    folder = make_images(tmp_path / 'photos', [(96, 72)])
    prepare_databases([folder], tmp_path / 'out', [4], **SMALL)
    lq, gt = (str(tmp_path / 'out' / name) for name in ('LR_bicubic_X4_sub.lmdb', 'HR_sub.lmdb'))
    paths = paired_paths_from_lmdb([lq, gt], ['lq', 'gt'])
    client = FileClient('lmdb', db_paths=[lq, gt], client_keys=['lq', 'gt'])
    assert len(paths) == 3 * 2
    assert imfrombytes(client.get(paths[0]['lq_path'], 'lq'), float32=True).shape == (12, 12, 3)
    assert imfrombytes(client.get(paths[0]['gt_path'], 'gt'), float32=True).shape == (48, 48, 3)


def test_an_image_smaller_than_a_sub_image_is_kept(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(32, 100), (30, 21)])
    prepared = prepare_databases([folder], tmp_path / 'out', [4], **SMALL)
    assert set(read_meta_info(prepared.databases[1]).values()) == {(32, 48, 3), (28, 20, 3)}
    assert prepared.smallest == (28, 20)


def test_size_0_keeps_images_whole(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(33, 50), (40, 40)])
    prepared = prepare_databases([folder], tmp_path / 'out', [4], size=0, progress=False)
    assert {scale: path.name for scale, path in prepared.databases.items()} == {1: 'HR.lmdb', 4: 'LR_bicubic_X4.lmdb'}
    assert read_meta_info(prepared.databases[1]) == {'0001': (32, 48, 3), '0002': (40, 40, 3)}


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_raw_images_are_whole_and_as_they_are(tmp_path, kind):
    rng = np.random.default_rng(0)
    images = {f'{n}': rng.integers(0, np.iinfo(kind).max + 1, (301 + n, 403, 3), kind) for n in range(3)}
    (tmp_path / 'photos').mkdir()
    for key, image in images.items():
        cv2.imwrite(f'{tmp_path}/photos/{key}.png', image)
    prepared = prepare_databases([tmp_path / 'photos'], tmp_path, [2, 3], raw=True, progress=False)
    names = ['HR_raw.lmdb', 'LR_bicubic_X2_raw.lmdb', 'LR_bicubic_X3_raw.lmdb']
    assert [path.name for path in prepared.databases.values()] == names
    assert (prepared.images, prepared.entries, prepared.smallest) == (3, 3, (300, 402))
    for scale, path in prepared.databases.items():
        database, meta = RawDatabase(path), (path / 'meta_info.txt').read_text().splitlines()
        for line, (key, image) in zip(meta, images.items()):
            expected = bicubic_downscale(image[:300, :402], scale) if scale > 1 else image[:300, :402]
            pixels = database.view(key)[:, :]
            np.testing.assert_array_equal(pixels, expected[:, :, ::-1])
            height, width = expected.shape[:2]
            checksum = zlib.crc32(expected[:, :, ::-1].tobytes())
            assert line == f'{key}.raw ({height},{width},3) {kind.__name__} {checksum:08x}'


def test_what_both_forms_take_on_the_disk(tmp_path, make_images):
    """Each run tells the size of its own, and of the other what that has."""
    folder = make_images(tmp_path / 'photos', [(1000, 730), (900, 960), (500, 500)])
    png = prepare_databases([folder], tmp_path, [4], progress=False)
    raw = prepare_databases([folder], tmp_path, [4], progress=False, raw=True)
    for prepared, own in ((png, 'png'), (raw, 'raw')):
        files = [path / 'data.mdb' for path in prepared.databases.values()]
        assert prepared.bytes[own] == sum(file.stat().st_size for file in files)
    assert 0.97 < png.bytes['raw'] / raw.bytes['raw'] < 1
    assert 0.9 < raw.bytes['png'] / png.bytes['png'] < 1.1
    with pytest.raises(InputError, match='--size must be left out with --raw, which keeps images whole, got 480'):
        prepare_databases([folder], tmp_path, [4], size=480, raw=True)


def test_a_raw_image_that_is_not_the_one_written(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(40, 44)])
    databases = prepare_databases([folder], tmp_path, [2], raw=True, progress=False).databases
    check_databases(databases[1], {2: databases[2]})
    with lmdb.open(str(databases[2]), map_size=1 << 24) as env, env.begin(write=True) as transaction:
        value = bytearray(transaction.get(b'0001.00000'))
        value[7] ^= 1
        transaction.put(b'0001.00000', bytes(value))
    with pytest.raises(InputError, match='LR_bicubic_X2_raw.lmdb: 0001 is not a whole raw image of 22 x 20 pixels'):
        check_databases(databases[1], {2: databases[2]})


@pytest.mark.parametrize('root, name', [('DIV2K', 'DIV2K_train'), ('Flickr2K', 'Flickr2K')])
def test_published_layouts_bring_their_own_lr(tmp_path, make_images, root, name):
    make_images(tmp_path / root / f'{name}_HR', [(96, 72), (98, 75)])
    # The second LR image is of the size that MATLAB gives, rounded up.
    lr = make_images(tmp_path / root / f'{name}_LR_bicubic' / 'X4', [(24, 18), (25, 19)], ['0001x4', '0002x4'])
    (tmp_path / root / 'readme.txt').touch()
    for folder in (tmp_path / root, tmp_path / root / f'{name}_HR'):
        prepared = prepare_databases([folder], tmp_path / 'out', [2, 4], overwrite=True, **SMALL)
        values, _ = contents(prepared.databases[4])
        for key in ('0001', '0002'):
            np.testing.assert_array_equal(
                decode(values[f'{key}_s001'.encode()]), cv2.imread(str(lr / f'{key}x4.png'))[:12, :12]
            )
        hr = cv2.imread(str(tmp_path / root / f'{name}_HR' / '0001.png'))
        np.testing.assert_array_equal(
            decode(contents(prepared.databases[2])[0][b'0001_s001']), bicubic_downscale(hr, 2)[:24, :24]
        )


def test_given_lr_folders_pair_with_the_hr_folders_in_order(tmp_path, make_images):
    hr = [make_images(tmp_path / f'hr{i}', [(48, 48)], [f'image {i}.a']) for i in (1, 2)]
    lr = [
        make_images(tmp_path / 'lr1', [(12, 12)], ['image 1.a']),
        make_images(tmp_path / 'lr2' / 'X4', [(12, 12)], ['image 2.ax4']).parent,
    ]
    prepared = prepare_databases(hr, tmp_path / 'out', [4], lr, **SMALL)
    values, _ = contents(prepared.databases[4])
    assert list(values) == [b'image_1_a_s001', b'image_2_a_s001']
    np.testing.assert_array_equal(decode(values[b'image_2_a_s001']), cv2.imread(str(lr[1] / 'X4' / 'image 2.ax4.png')))


@pytest.mark.parametrize(
    'lr, kind',
    [
        ('LR', ''),
        ('LR/X4', ''),
        ('bicubic_photos/LR', ''),
        ('DIV2K_valid_LR_bicubic/X4', '_bicubic'),
        ('LRbicx4', '_bicubic'),
        ('LR_bicubic/x4', '_bicubic'),
    ],
)
def test_given_lr_images_are_called_bicubic_only_where_their_folder_is(tmp_path, make_images, monkeypatch, lr, kind):
    folder, lr_folder = make_images(tmp_path / 'hr', [(48, 48)]), make_images(tmp_path / lr, [(12, 12)])
    prepared = prepare_databases([folder], tmp_path / 'out', [4], [lr_folder], **SMALL)
    assert prepared.databases[4].name == f'LR{kind}_X4_sub.lmdb'
    monkeypatch.chdir(lr_folder)
    prepared = prepare_databases([folder], tmp_path / 'whole', [4], ['.'], size=0, progress=False)
    assert prepared.databases[4].name == f'LR{kind}_X4.lmdb'


def test_lr_images_are_those_of_the_published_test_sets(tmp_path, benchmark_set):
    folder = benchmark_set('Set5')
    for border, equal in ((None, 5), ('replicate', 5), ('mirror', 0)):
        prepared = prepare_databases(
            [folder / 'GTmod3'], tmp_path / str(border), [3], size=0, progress=False, border=border
        )
        made, _ = contents(prepared.databases[3])
        published = {path.stem.encode(): cv2.imread(str(path)) for path in (folder / 'LRbicx3').iterdir()}
        assert made.keys() == published.keys()
        assert sum(np.array_equal(decode(made[key]), published[key]) for key in made) == equal


def test_gray_and_opaque_images_become_three_channels(tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 4), np.uint8)
    image[:, :, 3] = 255
    cv2.imwrite(str(folder / 'alpha.png'), image)
    cv2.imwrite(str(folder / 'gray.png'), image[:, :, 0])
    values, _ = contents(prepare_databases([folder], tmp_path / 'out', [2], **SMALL).databases[1])
    np.testing.assert_array_equal(decode(values[b'alpha_s001']), image[:, :, :3])
    np.testing.assert_array_equal(decode(values[b'gray_s001']), image[:, :, [0, 0, 0]])


@pytest.mark.parametrize('suffix', ['.png', '.tiff'])
def test_16_bits_stay(tmp_path, suffix):
    """To the bit; LR images are made of all of them. A pair may be of two depths."""
    (tmp_path / 'hr').mkdir()
    (tmp_path / 'lr').mkdir()
    image = np.random.default_rng(0).integers(0, 65536, (48, 72, 4), np.uint16)
    image[..., 3] = 65535
    small = np.random.default_rng(1).integers(0, 256, (24, 36, 3), np.uint8)
    for name, pixels in (('color', image[..., :3]), ('gray', image[..., 0]), ('opaque', image)):
        cv2.imwrite(str(tmp_path / f'hr/{name}{suffix}'), pixels)
        cv2.imwrite(str(tmp_path / f'lr/{name}.png'), small)
    expected = {name: image[..., :3] for name in ('color', 'opaque')}
    expected['gray'] = np.dstack([image[..., 0]] * 3)
    made = prepare_databases([tmp_path / 'hr'], tmp_path / 'made', [3], size=0, progress=False).databases
    given = prepare_databases(
        [tmp_path / 'hr'], tmp_path / 'given', [2], lr_folders=[tmp_path / 'lr'], size=0, progress=False
    ).databases
    for name, pixels in expected.items():
        for database in (made, given):
            np.testing.assert_array_equal(decode(contents(database[1])[0][name.encode()]), pixels)
        found = decode(contents(made[3])[0][name.encode()])
        assert found.dtype == np.uint16
        # What 8 bits would give is within two of their levels, and another.
        beside = bicubic_downscale(np.rint(pixels / 257).astype(np.uint8), 3)
        assert 0 < np.abs(found / 257 - beside).max() < 2
        np.testing.assert_array_equal(found, bicubic_downscale(pixels, 3))
        np.testing.assert_array_equal(decode(contents(given[2])[0][name.encode()]), small)


def test_any_number_of_workers_makes_the_same_files(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(60 + 7 * i, 120 - 5 * i) for i in range(9)])
    for workers in (1, 4):
        prepare_databases([folder], tmp_path / str(workers), [2, 4], workers=workers, **SMALL)
    names = sorted(path.relative_to(tmp_path / '1') for path in (tmp_path / '1').rglob('*.*'))
    assert names == sorted(path.relative_to(tmp_path / '4') for path in (tmp_path / '4').rglob('*.*'))
    for name in names:
        if (tmp_path / '1' / name).is_file():
            assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '4' / name).read_bytes()


def test_few_images_are_in_hand_at_a_time():
    started = []

    def items():
        for number in range(100):
            started.append(number)
            yield number

    for done, result in enumerate(prepare_module._map_in_order(lambda x: 2 * x, items(), workers=3)):
        assert result == 2 * done
        assert len(started) - done <= 2 * 3


def test_a_database_outgrows_its_first_map(tmp_path, monkeypatch):
    monkeypatch.setattr('lora_sr.data.lmdb_store.FIRST_MAP_BYTES', 1 << 16)
    monkeypatch.setattr('lora_sr.data.lmdb_store.BATCH_BYTES', 1 << 17)
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    writer = LmdbWriter(tmp_path / 'db')
    for number in range(40):
        writer.put(f'{number:03d}', encode_png(image), 100, 100)
    writer.finish()
    check_databases(tmp_path / 'db', {})
    assert len(contents(tmp_path / 'db')[0]) == 40
    assert (tmp_path / 'db' / 'data.mdb').stat().st_size < 40 * 40000


@pytest.mark.parametrize('damage', ['missing', 'extra', 'swapped', 'cut', 'other size', 'other pixels'])
def test_the_check_finds_what_is_wrong(tmp_path, make_images, damage):
    folder = make_images(tmp_path / 'photos', [(48, 96)])
    databases = prepare_databases([folder], tmp_path / 'out', [2], **SMALL).databases
    check_databases(databases[1], {2: databases[2]})
    values, meta = contents(databases[2])
    first, *_, last = sorted(values)
    png = values[first]
    with lmdb.open(str(databases[2]), lock=False) as env, env.begin(write=True) as transaction:
        if damage == 'missing':
            transaction.delete(last)
        elif damage == 'extra':
            transaction.put(b'more', png)
        elif damage == 'swapped':
            (databases[2] / 'meta_info.txt').write_text(''.join(reversed(meta.splitlines(True))))
        elif damage == 'cut':
            transaction.put(first, png[:-1])
        elif damage == 'other size':
            transaction.put(first, bytes(encode_png(decode(png)[:, :-1])))
        else:
            transaction.put(first, png[:200] + bytes(len(png) - 212) + png[-12:])
    with pytest.raises(InputError, match='LR_bicubic_X2_sub'):
        check_databases(databases[1], {2: databases[2]})


def test_the_check_tells_sizes_by_width_and_height(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(48, 96)])
    databases = prepare_databases([folder], tmp_path / 'out', [2], size=0, progress=False).databases
    meta = databases[2] / 'meta_info.txt'
    meta.write_text('0001.png (20,48,3) 1\n')
    with pytest.raises(InputError, match='not a whole PNG image of 48 x 20 pixels of 3 channels'):
        check_databases(databases[1], {2: databases[2]})
    meta.write_text('0001.png (24,48,3) 1\n')
    with pytest.raises(InputError, match='has 48 x 24 pixels of 3 channels and its HR image 96 x 48 pixels'):
        check_databases(databases[1], {3: databases[2]})


# Each argument after the first two is a moment: a process is forked, and kills itself at that moment.
KILL = """
import os, shutil, signal, sys
import lora_sr.data.cutting as cutting
import lora_sr.data.prepare as p

def at_call(function, number):
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

folder, root, *moments = sys.argv[1:]
for moment in moments:
    pid = os.fork()
    if not pid:
        name, number = moment.split('-')
        owner = {'rename': os, 'rmtree': shutil, 'replace': os, 'put': p.LmdbWriter, 'read_image': cutting}.get(name, p)
        setattr(owner, name, at_call(getattr(owner, name), int(number)))
        p.prepare_databases([folder], os.path.join(root, moment), [2, 4], size=48, step=24, overwrite=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, moment
"""
MOMENTS = [
    'read_image-1',
    'read_image-7',
    'put-1',
    'put-40',
    'check_databases-1',
    'replace-1',
    *(f'rename-{number}' for number in range(1, 10)),
    'rmtree-1',
]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
@pytest.mark.parametrize('before', ['nothing', 'an older pair'])
def test_a_kill_at_any_moment_leaves_nothing_half_made_and_a_second_run_completes(tmp_path, make_images, before):
    old = make_images(tmp_path / 'old', [(60, 60)])
    new = make_images(tmp_path / 'new', [(60 + 7 * i, 120 - 5 * i) for i in range(9)])
    wanted = {
        path: contents(path)
        for path in prepare_databases([new], tmp_path / 'wanted', [2, 4], **SMALL).databases.values()
    }
    moments = (
        MOMENTS if before == 'an older pair' else [m for m in MOMENTS if m not in ('rename-7', 'rename-8', 'rename-9')]
    )
    for moment in moments:
        if before == 'an older pair':
            prepare_databases([old], tmp_path / moment, [2, 4], **SMALL)
    if before == 'an older pair':
        wanted_old = {path.name: contents(path) for path in (tmp_path / moments[0]).iterdir()}
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, '-c', KILL, new, tmp_path, *moments], check=True, env=environment)
    for moment in moments:
        output = tmp_path / moment
        left = {path.name: contents(path) for path in output.glob('*.lmdb')}
        assert not [path for path in (output / '.prepare.partial').rglob('*.lmdb') if 'replaced' not in path.parts]
        complete = {path.name: content for path, content in wanted.items()}
        assert all(content == complete[name] for name, content in left.items()) or (
            before == 'an older pair' and all(content == wanted_old[name] for name, content in left.items())
        ), moment
        # A first set needs no leave to overwrite: what the kill left does not count as a finished set.
        prepare_databases([new], output, [2, 4], overwrite=before == 'an older pair', **SMALL)
        assert sorted(path.name for path in output.iterdir()) == sorted(complete)
        for path, content in wanted.items():
            assert contents(output / path.name) == content, moment


def test_what_was_interrupted_is_not_finished_with_another_border(tmp_path, make_images, monkeypatch):
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    for border in ('replicate', 'mirror'):
        with monkeypatch.context() as context:
            context.setattr(prepare_module, 'move_into_place', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare_databases([folder], tmp_path / border, [2], border='mirror', **SMALL)
    prepare_databases([folder], tmp_path / 'mirror', [2], border='mirror', **SMALL)
    with pytest.raises(InputError, match='already exist'):
        prepare_databases([folder], tmp_path / 'replicate', [2], border='replicate', **SMALL)


def test_what_was_interrupted_is_not_finished_without_skip_broken(tmp_path, make_images, monkeypatch):
    folder = make_images(tmp_path / 'photos', [(60, 60)] * 3)
    (folder / '0002.png').write_bytes(b'')
    for output in ('with', 'without'):
        with monkeypatch.context() as context:
            context.setattr(prepare_module, 'move_into_place', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare_databases([folder], tmp_path / output, [2], skip_broken=True, **SMALL)
    # What was left out is told by the run that finishes, too.
    prepared = prepare_databases([folder], tmp_path / 'with', [2], skip_broken=True, **SMALL)
    assert prepared.images == 2 and list(prepared.left_out) == [str(folder / '0002.png')]
    with pytest.raises(InputError, match='already exist'):
        prepare_databases([folder], tmp_path / 'without', [2], **SMALL)
    with pytest.raises(InputError, match='0002.png is damaged'):
        prepare_databases([folder], tmp_path / 'without', [2], overwrite=True, **SMALL)


def test_skip_broken_makes_the_databases_of_folders_without_them(tmp_path, make_images):
    sizes = [(60 + 7 * i, 120 - 5 * i) for i in range(9)]
    for name in ('all', 'good'):
        make_images(tmp_path / name / 'HR', sizes)
        for scale in (2, 4):
            lr_sizes = [(height // scale, width // scale) for height, width in sizes]
            make_images(tmp_path / name / 'LR' / f'X{scale}', lr_sizes)
    broken, good = tmp_path / 'all', tmp_path / 'good'
    (broken / 'HR/0001.png').write_bytes((broken / 'HR/0001.png').read_bytes()[:-20])
    cv2.imwrite(str(broken / 'HR/0002.png'), np.zeros((3, 90, 3), np.uint8))
    (broken / 'LR/X2/0004.png').write_bytes(b'no image')
    cv2.imwrite(str(broken / 'LR/X4/0005.png'), np.zeros((90, 9, 3), np.uint8))
    for missing in ('LR/X4/0006.png', 'LR/X2/0007.png', 'LR/X4/0007.png', 'HR/0008.png', 'LR/X2/0008.png'):
        (broken / missing).unlink()
    for number in (1, 2, 4, 5, 6, 7, 8):
        for folder in ('HR', 'LR/X2', 'LR/X4'):
            (good / folder / f'000{number}.png').unlink()
    made, wanted = (
        prepare_databases([root / 'HR'], root / 'out', [2, 4], [root / 'LR'], skip_broken=root is broken, **SMALL)
        for root in (broken, good)
    )
    assert made.images == wanted.images == 2 and not wanted.left_out
    for scale, path in wanted.databases.items():
        assert contents(made.databases[scale]) == contents(path)
        assert (made.databases[scale] / 'data.mdb').read_bytes() == (path / 'data.mdb').read_bytes()
    left = {str(broken / 'HR' / f'000{number}.png') for number in (1, 2, 4, 5, 6, 7)}
    assert set(made.left_out) == {*left, str(broken / 'LR/X4/0008.png')}
    with pytest.raises(InputError, match='7 of 9 images cannot be used, which --skip-broken leaves out:'):
        prepare_databases([broken / 'HR'], tmp_path / 'refused', [2, 4], [broken / 'LR'], **SMALL)
    assert not (tmp_path / 'refused').exists()


def test_crop_keeps_the_top_left_corner_of_what_pairs_share(tmp_path, make_images):
    # HR, and LR at scales 2 and 4, (height, width); wanted of HR: multiples of 4, within 2 x 2 and 4 x 4 pixels.
    pairs = [
        ((100, 81), (48, 40), (26, 22), (96, 80)),
        ((97, 88), (50, 43), (23, 22), (92, 84)),
        ((96, 88), (48, 44), (24, 22), (96, 88)),
    ]
    hr = make_images(tmp_path / 'HR', [pair[0] for pair in pairs])
    for scale, place in ((2, 1), (4, 2)):
        make_images(tmp_path / 'LR' / f'X{scale}', [pair[place] for pair in pairs])
    options = dict(lr_folders=[tmp_path / 'LR'], size=0, progress=False)
    prepared = prepare_databases([hr], tmp_path / 'out', [2, 4], crop=True, **options)
    for scale, folder in ((1, hr), (2, tmp_path / 'LR/X2'), (4, tmp_path / 'LR/X4')):
        values, _ = contents(prepared.databases[scale])
        for name, (*_, (height, width)) in zip(('0001', '0002', '0003'), pairs):
            image = cv2.imread(str(folder / f'{name}.png'))[: height // scale, : width // scale]
            np.testing.assert_array_equal(decode(values[name.encode()]), image)
    with pytest.raises(InputError, match='(?s)2 of 3 images cannot be used, .*: --crop trims both'):
        prepare_databases([hr], tmp_path / 'refused', [2, 4], **options)


def test_crop_makes_missing_lr_images_of_what_is_left(tmp_path, make_images):
    hr = make_images(tmp_path / 'a_HR', [(60, 48)])
    make_images(tmp_path / 'a_LR_bicubic' / 'X4', [(13, 14)])
    prepared = prepare_databases([hr], tmp_path / 'out', [2, 4], crop=True, size=0, progress=False)
    values, _ = contents(prepared.databases[2])
    image = cv2.imread(str(hr / '0001.png'))[:52, :48]
    np.testing.assert_array_equal(decode(values[b'0001']), bicubic_downscale(image, 2))


def test_crop_changes_nothing_where_sizes_fit(tmp_path, make_images):
    hr, lr = make_images(tmp_path / 'hr', [(98, 75)]), make_images(tmp_path / 'lr', [(25, 19)])
    without, cropped = (
        contents(prepare_databases([hr], tmp_path / str(crop), [4], [lr], crop=crop, **SMALL).databases[4])
        for crop in (False, True)
    )
    assert cropped == without


def test_crop_leaves_no_pair_too_small(tmp_path, make_images):
    hr, lr = make_images(tmp_path / 'hr', [(12, 14)]), make_images(tmp_path / 'lr', [(1, 4)])
    small = make_images(tmp_path / 'small', [(11, 14)])
    with pytest.raises(InputError, match=r'in common with its LR images, got 12 x 4 \(width x height\)'):
        make_images(tmp_path / 'x' / 'X3', [(4, 4)])
        make_images(tmp_path / 'x' / 'X4', [(1, 3)])
        prepare_databases([hr], tmp_path / 'out', [3, 4], [tmp_path / 'x'], crop=True, size=0, progress=False)
    assert prepare_databases([small], tmp_path / 'out', [4], [lr], crop=True, size=0, progress=False).smallest == (
        4,
        12,
    )


def test_an_interrupt_leaves_nothing(tmp_path, make_images, monkeypatch):
    folder = make_images(tmp_path / 'photos', [(60, 60)] * 5)
    monkeypatch.setattr(LmdbWriter, 'put', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_databases([folder], tmp_path / 'a' / 'b', [2], **SMALL)
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('error', [lmdb.DiskError('No space left on device'), OSError(28, 'No space left on device')])
def test_a_full_disk_is_told_in_one_sentence(tmp_path, make_images, monkeypatch, error):
    folder = make_images(tmp_path / 'photos', [(60, 60)] * 5)
    monkeypatch.setattr(LmdbWriter, '_commit', lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match='cannot be written there .*No space left'):
        prepare_databases([folder], tmp_path / 'out', [2], **SMALL)
    assert not (tmp_path / 'out').exists()


def test_a_second_run_at_the_same_time_is_refused(tmp_path, make_images):
    pytest.importorskip('fcntl')
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    with partial_folder(tmp_path / 'out') as held:
        (held / 'work').touch()
        with pytest.raises(InputError, match='another'):
            prepare_databases([folder], tmp_path / 'out', [2], **SMALL)
        assert (held / 'work').exists()


@pytest.mark.parametrize('kind', ['a link', 'a link to nothing', 'a file', 'that of another user'])
def test_a_partial_folder_that_is_not_its_own_is_refused(tmp_path, make_images, kind):
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    partial, precious = tmp_path / 'out' / PARTIAL_FOLDER, tmp_path / 'precious'
    partial.parent.mkdir()
    precious.mkdir()
    (precious / 'file').write_text('mine')
    if kind == 'that of another user':
        if not hasattr(os, 'geteuid') or os.geteuid():
            pytest.skip('only root can give a folder away')
        partial.mkdir()
        os.chown(partial, 12345, -1)
    elif kind == 'a file':
        partial.write_text('mine')
    else:
        partial.symlink_to(precious if kind == 'a link' else tmp_path / 'nowhere')
    with pytest.raises(InputError, match=f'partial must be a folder .* got {kind.removesuffix(" to nothing")}'):
        prepare_databases([folder], tmp_path / 'out', [2], **SMALL)
    assert os.path.lexists(partial) and (precious / 'file').read_text() == 'mine'


def test_a_link_in_what_was_left_over_is_not_followed(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'file').write_text('mine')
    partial = tmp_path / 'out' / PARTIAL_FOLDER
    partial.mkdir(parents=True)
    (partial / 'folder').symlink_to(precious)
    (partial / 'complete.partial').symlink_to(precious / 'file')
    prepare_databases([folder], tmp_path / 'out', [2], **SMALL)
    assert (precious / 'file').read_text() == 'mine' and not partial.exists()


@pytest.mark.parametrize(
    'text',
    [
        '',
        'hello',
        '[]',
        '[' * 100000,
        '{"databases": 3}',
        '{"databases": ["../mine.lmdb"], "job": "", "images": 1, "left_out": {}}',
    ],
)
def test_what_was_left_over_is_removed_where_it_does_not_say_that_it_is_complete(tmp_path, make_images, text):
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    partial = tmp_path / 'out' / PARTIAL_FOLDER
    (partial / 'mine').mkdir(parents=True)
    (partial / COMPLETE_FILE).write_text(text)
    prepare_databases([folder], tmp_path / 'out', [2], **SMALL)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['HR_sub.lmdb', 'LR_bicubic_X2_sub.lmdb']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'photos']


def test_databases_that_were_to_be_replaced_are_not_lost(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    partial = tmp_path / 'out' / PARTIAL_FOLDER
    old = partial / REPLACED_FOLDER / 'HR_sub.lmdb'
    old.mkdir(parents=True)
    (partial / COMPLETE_FILE).write_text('')  # of a power cut
    with pytest.raises(
        InputError, match='has databases that a run was about to replace, and complete.json beside it is'
    ):
        prepare_databases([folder], tmp_path / 'out', [2], **SMALL)
    assert old.is_dir()


def test_no_bar_where_there_is_no_stderr(tmp_path, make_images, monkeypatch):
    folder = make_images(tmp_path / 'photos', [(60, 60)])
    monkeypatch.setattr(sys, 'stderr', None)
    assert prepare_databases([folder], tmp_path / 'out', [2]).images == 1
    assert degrade_folder(folder, tmp_path / 'lr', 2).images == 1


def test_a_finished_database_is_replaced_only_when_asked(tmp_path, make_images):
    first, second = (make_images(tmp_path / name, [(size, size)]) for name, size in (('a', 48), ('b', 96)))
    prepared = prepare_databases([first], tmp_path / 'out', [2], **SMALL)
    before = contents(prepared.databases[1])
    with pytest.raises(InputError, match='HR_sub.lmdb already exist.*--overwrite'):
        prepare_databases([second], tmp_path / 'out', [3], **SMALL)
    assert contents(prepared.databases[1]) == before
    prepare_databases([second], tmp_path / 'out', [2], overwrite=True, **SMALL)
    assert len(contents(prepared.databases[1])[0]) == 9
    shutil.rmtree(prepared.databases[1])
    with pytest.raises(InputError, match='LR_bicubic_X2_sub.lmdb already exist'):
        prepare_databases([second], tmp_path / 'out', [2], **SMALL)
