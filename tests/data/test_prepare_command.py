"""Wrong input to `lora-sr prepare`: one sentence each, and nothing is written."""

import io
import os
import shutil

import cv2
import lmdb
import numpy as np
import pytest
import tifffile
from PIL import Image

from lora_sr.cli.main import main
from lora_sr.data import read_meta_info


def call(*arguments):
    assert main(['prepare', *map(str, arguments)]) == 0


def test_says_what_was_made(tmp_path, make_images, capfd):
    folder = make_images(tmp_path / 'photos', [(500, 490)])
    call(folder, '-o', tmp_path / 'out', '--scale', 4)
    out, err = capfd.readouterr()
    assert not err
    assert f'{tmp_path}/out/HR_sub.lmdb: 4 entries of 1 images' in out
    assert 'gt_size can be up to 480' in out
    assert len(read_meta_info(tmp_path / 'out' / 'LR_bicubic_X4_sub.lmdb')) == 4


def test_reads_what_it_can_and_names_the_rest(tmp_path, make_images, capfd):
    folder = make_images(tmp_path / 'photos', [(64, 60)] * 4)
    files = sorted(folder.iterdir())
    expected = [cv2.imread(str(file)) for file in files]
    for file, suffix, kind in zip(files[1:], ('.TGA', '.jfif', '.jpe'), ('TGA', 'JPEG', 'JPEG')):
        Image.open(file).save(file.with_suffix(suffix), kind, quality=100)
        file.unlink()
    (folder / 'more').mkdir()
    for name in ('a.heic', 'notes.txt', 'z.zip', '.hidden'):
        (folder / name).touch()
    call(folder, '-o', tmp_path / 'out', '--scale', 2, '--size', 0)
    out, err = capfd.readouterr()
    assert 'HR.lmdb: 4 entries of 4 images' in out and 'the smallest HR entry has 60 x 64 pixels' in out
    assert err == f'not read in {folder}: a.heic, more/, notes.txt, and 1 more\n'
    with lmdb.open(str(tmp_path / 'out/HR.lmdb'), readonly=True, lock=False) as env, env.begin() as entries:
        for index, key in enumerate(('0001', '0002')):  # PNG and TGA lose nothing
            image = cv2.imdecode(np.frombuffer(entries.get(key.encode()), np.uint8), cv2.IMREAD_COLOR)
            assert np.array_equal(image, expected[index])


@pytest.mark.parametrize(
    'options, part',
    [
        ('--scale 1', '--scale must be different whole numbers from 2 to 16, got 1.'),
        ('--scale 2 2', '--scale must be different whole numbers from 2 to 16, got 2 2.'),
        ('--scale 99', 'got 99.'),
        ('--size 100 --scale 3', '--size must be a multiple of 3, for one HR database to fit scale 3, got 100.'),
        ('--step 0', '--step must be a whole number of at least 1, got 0.'),
        ('--step 10 --scale 4', '--step must be a multiple of 4, for one HR database to fit scale 4, got 10.'),
        ('--size -1', '--size must be'),
        ('--threshold -1', '--threshold must be'),
        ('--border wrap', '--border must be replicate or mirror, got wrap.'),
        ('--workers 0', '--workers must be'),
        ('--lr a b', '--lr must be an LR folder for each of the 1 HR folders, in the same order, got 2.'),
    ],
)
def test_wrong_options(tmp_path, make_images, refused, options, part):
    folder = make_images(tmp_path / 'photos', [(48, 48)])
    assert part in refused(folder, *options.split())


def test_a_border_for_lr_images_that_are_there(tmp_path, make_images, refused):
    hr, lr = make_images(tmp_path / 'hr', [(48, 48)]), make_images(tmp_path / 'lr', [(12, 12)])
    message = refused(hr, '--scale', 4, '--lr', lr, '--border', 'mirror')
    assert message == '--border must be left out where no LR image is made by bicubic, got mirror.'


def test_wrong_folders(tmp_path, make_images, refused):
    photos = make_images(tmp_path / 'photos', [(48, 48)])
    assert 'missing is not a folder' in refused(photos, tmp_path / 'missing')
    assert f'{tmp_path} has no images' in refused(tmp_path)
    assert '0001.png is not a folder' in refused(photos / '0001.png')
    more = make_images(tmp_path / 'more', [(48, 48)], suffix='.jpg')
    message = refused(photos, more)
    assert f'{photos}/0001.png and {more}/0001.jpg would have the same key, "0001"' in message
    (tmp_path / 'link').symlink_to(photos)
    for again in (photos, tmp_path / 'link'):
        sentence = f'Each folder of HR images must be given once, got {photos} and {again}, which are the same.'
        assert refused(photos, again) == sentence


def test_wrong_output(tmp_path, make_images, refused):
    photos = make_images(tmp_path / 'photos', [(48, 48)])
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    for output, kind in (
        (tmp_path / 'file', 'a file'),
        (tmp_path / 'file' / 'out', f'a file at {tmp_path}/file'),
        (tmp_path / 'link', 'a link that leads nowhere'),
    ):
        message = refused(photos, '--overwrite', output=output)
        assert message == f'The output {output} must be a folder, got {kind}.'
    assert (tmp_path / 'file').read_text() == 'mine' and not (tmp_path / 'nowhere').exists()


def test_lr_that_does_not_pair(tmp_path, make_images, refused):
    hr = make_images(tmp_path / 'hr', [(48, 48), (48, 48)])
    one = make_images(tmp_path / 'one', [(12, 12)])
    three = make_images(tmp_path / 'three', [(12, 12)] * 3)
    large = make_images(tmp_path / 'large', [(12, 12), (15, 12)])
    options = ('--scale', 4, '--lr')
    assert refused(hr, *options, one) == (
        '1 of 2 images cannot be used, which --skip-broken leaves out: '
        f'{hr}/0002.png has no LR image in {one}, where it must be called `0002x4` or `0002`.'
    )
    assert (
        f'1 of 3 images cannot be used, which --skip-broken leaves out: {three}/0003.png has no HR image in {hr}.'
        in (refused(hr, *options, three))
    )
    message = refused(hr, *options, large)
    assert (
        f'0002.png must have 12 x 12 pixels (width x height), the size of {hr}/0002.png by 4, got 12 x 15.' in message
    )
    assert 'X2 is not a folder' in refused(hr, '--lr', large)
    (tmp_path / 'link').symlink_to(hr)
    for same in (hr, tmp_path / 'link'):
        sentence = f'another folder than the HR images, got {hr} and {same}, which are the same.'
        assert refused(hr, *options, same) == f'The LR images must be in {sentence}'
    shutil.copy(one / '0001.png', one / '0002.png')
    shutil.copy(hr / '0001.png', hr / '0001.tga')
    assert refused(hr, *options, one) == (
        '1 of 3 images cannot be used, which --skip-broken leaves out: '
        f'{hr}/0001.tga must have a name of its own, got that of 0001.png: rename or remove one.'
    )


def test_bad_images_are_all_named(tmp_path, make_images, refused):
    folder = make_images(tmp_path / 'photos', [(400, 300)] * 30)
    whole = (folder / '0001.png').read_bytes()
    (folder / '0003.png').write_bytes(whole[: len(whole) // 2])
    (folder / '0009.png').write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    jpeg = cv2.imencode('.jpg', cv2.imread(str(folder / '0001.png')))[1].tobytes()
    (folder / '0030.png').unlink()
    (folder / '0030.jpg').write_bytes(jpeg[:-100])
    message = refused(folder)
    assert message.startswith('3 of 30 images cannot be used, which --skip-broken leaves out:')
    assert all(f'{name} is damaged' in message for name in ('0003.png', '0009.png', '0030.jpg'))


def test_one_run_names_all_that_cannot_be_used(tmp_path, make_images, refused):
    hr = make_images(tmp_path / 'hr', [(48, 48)] * 8)
    lr = make_images(tmp_path / 'lr', [(12, 12)] * 3 + [(12, 15)] * 3 + [(12, 12)])
    (hr / '0002.png').write_bytes(b'')
    (lr / '0003.png').write_bytes(b'')
    os.rename(lr / '0007.png', lr / 'other.png')
    message = refused(hr, '--scale', 4, '--lr', lr)
    assert message.startswith('8 of 9 images cannot be used, which --skip-broken leaves out:')
    assert [line.split()[0] for line in message.splitlines()[1:]] == [
        *map(str, (hr / '0007.png', hr / '0008.png', lr / 'other.png', hr / '0002.png', lr / '0003.png')),
        *(str(lr / f'000{number}.png') for number in (4, 5, 6)),
    ]


def test_skip_broken_names_what_it_leaves_out(tmp_path, make_images, capfd):
    hr = make_images(tmp_path / 'hr', [(48, 48)] * 3)
    (hr / '0002.png').write_bytes(b'')
    call(hr, '-o', tmp_path / 'out', '--scale', 4, '--skip-broken')
    out, err = capfd.readouterr()
    assert f'{tmp_path}/out/HR_sub.lmdb: 2 entries of 2 images' in out
    reason = f'{hr}/0002.png is damaged or is not an image: replace it or take it out of its folder.'
    assert err == f'lora-sr: note: 1 of 3 images left out: {reason}\n'
    (hr / '0001.png').write_bytes(b'')
    (hr / '0003.png').write_bytes(b'')
    assert main(['prepare', str(hr), '-o', str(tmp_path / 'none'), '--skip-broken']) == 2
    assert capfd.readouterr().err.startswith('lora-sr: error: 3 of 3 images cannot be used:')
    assert not (tmp_path / 'none').exists()


def test_a_refused_size_names_crop_where_it_helps(tmp_path, make_images, refused):
    hr = make_images(tmp_path / 'hr', [(48, 64)])
    for (height, width), helps in (((14, 16), True), ((12, 14), True), ((15, 16), False), ((12, 13), False)):
        lr = make_images(tmp_path / f'lr{height}{width}', [(height, width)])
        message = refused(hr, '--scale', 4, '--lr', lr)
        assert (
            f'must have 16 x 12 pixels (width x height), the size of {hr}/0001.png by 4, got {width} x {height}'
            in message
        )
        assert (': --crop trims both' in message) == helps
        assert main(
            ['prepare', str(hr), '-o', str(tmp_path / lr.name / 'out'), '--scale', '4', '--lr', str(lr), '--crop']
        ) == (0 if helps else 2)


def test_files_larger_than_an_image_and_names_that_are_no_text(tmp_path, make_images, refused):
    hr = make_images(tmp_path / 'hr', [(48, 48)])
    with (hr / 'huge\n.png').open('wb') as file:
        file.truncate(100 << 30)  # takes no place on the disk
    assert 'huge\\n.png must be an image of less than 2 GiB, got 100.0 GiB' in refused(hr)
    os.unlink(hr / 'huge\n.png')
    os.symlink(tmp_path / 'nowhere', hr / 'link.png')
    try:
        os.rename(hr / '0001.png', hr / 'a\udcfe.png')
    except OSError:
        pytest.skip('this file system has no such names')
    call(hr, '-o', tmp_path / 'out\udcff', '--scale', 4)
    assert list(read_meta_info(tmp_path / 'out\udcff' / 'HR_sub.lmdb')) == ['a__s001']


@pytest.mark.parametrize('place', ['sources.decode_deep', 'cutting.encode_png'])
@pytest.mark.parametrize('kind', [MemoryError, cv2.error])
def test_too_little_memory_is_told_in_one_sentence(tmp_path, make_images, refused, monkeypatch, place, kind):
    error = kind('Insufficient memory')
    error.code = cv2.Error.StsNoMem
    hr = make_images(tmp_path / 'hr', [(48, 48)])
    monkeypatch.setattr(f'lora_sr.data.{place}', lambda *_: (_ for _ in ()).throw(error))
    assert refused(hr) == f'1 of 1 images cannot be used: {hr}/0001.png needs more memory than there is.'


def tiff_of_planes(dtype=np.uint16):
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 32768, (3, 48, 48)).astype(dtype)
    tifffile.imwrite(file, values, photometric='rgb', planarconfig='separate')
    return file.getvalue()


@pytest.mark.parametrize(
    'name, content, part',
    [
        ('text.png', b'not an image', 'text.png is damaged or is not an image'),
        ('empty.jpg', b'', 'empty.jpg is damaged'),
        (
            '12bits.ppm',
            b'P6 48 48 4095\n' + bytes(13824),
            'or be a PNG or TIFF of 16-bit values, channels side by side',
        ),
        ('planes.tif', tiff_of_planes(), 'or be a PNG or TIFF of 16-bit values, channels side by side, got uint16'),
        ('signed.tif', tiff_of_planes(np.int16), 'got int16'),
        ('float.tif', tiff_of_planes(np.float32), 'got float32'),
        ('clear16.png', np.zeros((48, 48, 4), np.uint16), 'must be opaque'),
        ('clear.png', np.zeros((48, 48, 4), np.uint8), 'must be opaque'),
        (
            'tiny.png',
            np.zeros((48, 3, 3), np.uint8),
            'must have at least 12 pixels each way, got 3 x 48 (width x height).',
        ),
    ],
)
def test_an_image_that_cannot_be_used(tmp_path, make_images, refused, name, content, part):
    folder = make_images(tmp_path / 'photos', [(48, 48)])
    if not isinstance(content, bytes):
        content = cv2.imencode(name[-4:], content)[1].tobytes()
    (folder / name).write_bytes(content)
    assert part in refused(folder)


def test_a_jpeg_thumbnail_does_not_hide_a_cut(tmp_path, make_images, refused):
    folder = make_images(tmp_path / 'photos', [(480, 480)], suffix='.jpg')
    path = folder / '0001.jpg'
    data = path.read_bytes()
    thumbnail = cv2.imencode('.jpg', np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    data = data[:2] + b'\xff\xe1' + (len(thumbnail) + 2).to_bytes(2, 'big') + thumbnail + data[2:]
    path.write_bytes(data[:-2000])
    assert 'damaged' in refused(folder)
    path.write_bytes(data + b'what some cameras append')
    call(folder, '-o', tmp_path / 'out')


def test_ctrl_c_is_told_in_one_line(tmp_path, make_images, monkeypatch, capsys):
    folder = make_images(tmp_path / 'photos', [(48, 48)])
    monkeypatch.setattr('lora_sr.data.cutting.read_image', lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as caught:
        call(folder, '-o', tmp_path / 'out')
    assert caught.value.code == 130
    assert capsys.readouterr().err.count('\n') == 1
    assert not (tmp_path / 'out').exists()
