"""`lora-sr upscale`: arrays and files, what is kept, what is refused, and what a failure leaves behind."""

import argparse
import os
import resource
import shutil
import threading

import cv2
import numpy as np
import pytest
import tifffile
import torch
from enlarging import Enlarge, pixels, repeated
from PIL import Image, PngImagePlugin
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, lora_layers, save_adapter
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import NetworkSource
from lora_sr.cli import upscale as command
from lora_sr.cli.arguments import weighted
from lora_sr.deploy import upscale as module
from lora_sr.deploy.adapters import merge_adapters
from lora_sr.deploy.upscale import upscale
from lora_sr.errors import InputError
from lora_sr.images.formats import FORMATS
from lora_sr.runtime import upscaler as upscaler_module
from lora_sr.runtime.upscaler import Upscaler


@pytest.fixture
def enlarging(monkeypatch):
    """Any checkpoint is that network."""
    monkeypatch.setattr(module, 'load_network', lambda path: Enlarge())


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('checkpoint') / 'SPAN.pth'
    torch.save({'params': SPAN(feature_channels=6, upscale=2, deploy=True).state_dict()}, path)
    return path


def run(*arguments) -> int:
    """The command by itself; its exit status as `lora-sr` gives it."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(['upscale', *map(str, arguments)])
    try:
        args.run(args)
    except InputError:
        return 2
    except SystemExit as error:
        return error.code
    return 0


def files_in(folder) -> list:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


# Files


def test_set14_has_its_published_psnr(shared, tmp_path):
    lr, gt = (shared / 'data/benchmark/Set14' / name for name in ('LRbicx4', 'GTmod4'))
    model = shared / 'weights/DSCLoRA/DSCF_ch26_x4.pth'
    values = {}
    for name, tile in (('whole', None), ('tiled', 72)):
        report = upscale([lr], model, tmp_path / name, tile=tile)
        assert (report.images, report.failures) == (14, {})
        psnr = []
        for path in sorted(gt.iterdir()):
            upscaled = np.asarray(Image.open(tmp_path / name / path.name).convert('RGB'), np.float64)
            original = np.asarray(Image.open(path).convert('RGB'), np.float64)
            # Y of YCbCr, BT.601 in MATLAB's range
            y = [16 + image @ [65.481, 128.553, 24.966] / 255 for image in (original, upscaled)]
            psnr.append(peak_signal_noise_ratio(*(image[4:-4, 4:-4] for image in y), data_range=255))
        values[name] = np.mean(psnr)
    assert round(values['whole'], 4) == round(values['tiled'], 4) == 28.3458
    for path in (tmp_path / 'whole').iterdir():
        whole, tiled = (cv2.imread(str(tmp_path / name / path.name)).astype(int) for name in ('whole', 'tiled'))
        assert np.abs(whole - tiled).max() <= 1


def write_mixed(folder, count) -> dict:
    """Images of all kinds; name -> pixels."""
    expected = {}
    for index in range(count):
        kind = index % 10
        image = cv2.GaussianBlur(pixels(7 + index % 5, 9, 4), (0, 0), 2)
        deep = image.astype(np.uint16) * 257 + index
        sub = folder / ('deep' if kind == 9 else '.')
        sub.mkdir(parents=True, exist_ok=True)
        name, mode, result = {
            0: ('.png', 'RGB', image[..., :3]),
            1: ('.jpg', 'RGB', image[..., :3]),
            2: ('.webp', 'RGBA', image),
            3: ('.tif', 'RGB', image[..., :3]),
            4: ('.png', 'L', image[..., 0]),
            5: ('.png', 'LA', image[..., :2]),
            6: ('.png', None, deep[..., :3]),
            7: ('.tiff', None, deep[..., 0]),
            8: ('.JPEG', 'L', image[..., 0]),
            9: ('.png', 'RGBA', image),
        }[kind]
        path = sub / f'{index:03}{name}'
        if kind == 6:
            cv2.imwrite(str(path), result[..., ::-1])
        elif kind == 7:
            tifffile.imwrite(path, result)
        else:
            options = {'lossless': True} if name == '.webp' else {}
            Image.fromarray(result, mode).save(path, **options)
        if name.lower().startswith('.jp'):
            result = np.asarray(Image.open(path))
        expected[str(path.relative_to(folder))] = result
    return expected


BROKEN = {
    'a_text.png': b'no pixels here',
    'b_empty.jpg': b'',
    'c_cut.png': None,
    'd_cut.jpg': None,
    'deep/e_cut.tif': None,
}


def write_broken(folder):
    image = pixels(30, 30, 3)
    for name, content in BROKEN.items():
        path = folder / name
        if content is None:
            Image.fromarray(image).save(path)
            content = path.read_bytes()[:-200]
        path.write_bytes(content)


def read_plain(path) -> np.ndarray:
    if path.suffix == '.tiff':
        return tifffile.imread(path)
    image = Image.open(path)
    if image.mode == 'LA':
        return np.asarray(image)
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]]


def test_three_hundred_images_with_five_broken_ones(enlarging, tmp_path, capsys):
    expected = write_mixed(tmp_path / 'in', 295)
    write_broken(tmp_path / 'in')
    (tmp_path / 'in' / 'notes.txt').write_text('left out, as is what is hidden')
    (tmp_path / 'in' / '.hidden.png').write_bytes(b'x')
    assert run(tmp_path / 'in', '-m', 'any.pth', '-o', tmp_path / 'out') == 1
    out, err = capsys.readouterr()
    assert out.startswith('295 images in ') and out.endswith(' images/s, 5 failed\n')
    lines = [line for line in err.splitlines() if line.startswith('lora-sr: error: ')]
    assert len(lines) == len(BROKEN)
    for name in BROKEN:
        assert sum(str(tmp_path / 'in' / name) in line for line in lines) == 1
    assert files_in(tmp_path / 'out') == sorted(expected)
    for name, image in expected.items():
        result = read_plain(tmp_path / 'out' / name)
        assert result.dtype == image.dtype and result.shape[2:] == image.shape[2:], name
        levels = 6 if name.lower().endswith(('jpg', 'jpeg')) else 8 if name.endswith('webp') else 0
        colors = slice(None) if image.ndim == 2 else slice(0, 3 if image.shape[2] > 2 else 1)
        difference = np.abs(result[..., colors].astype(int) - repeated(image)[..., colors])
        assert difference.max() <= levels, name


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('suffix', ['.bmp', '.dib', '.tga', '.jp2', '.jpx', '.j2k', '.j2c', '.avif', '.png', '.tif'])
def test_any_format_in_and_out(enlarging, tmp_path, suffix, channels):
    """What a format holds without loss comes out repeated, by whichever program it is read."""
    image = pixels(20, 17, channels)
    image[..., -1] |= 64  # nothing is hidden, also where AVIF loses a little
    kind = {'.dib': 'BMP', '.jpx': 'JPEG2000', '.j2c': 'JPEG2000'}.get(suffix)
    options = {'lossless': True} if suffix == '.webp' else {'no_jp2': True} if suffix in ('.j2k', '.j2c') else {}
    source = tmp_path / f'image{suffix}'
    if suffix in ('.bmp', '.dib'):  # of which Pillow writes no alpha
        source.write_bytes(cv2.imencode('.bmp', image[..., [2, 1, 0, 3][:channels]] if channels > 1 else image)[1])
    else:
        Image.fromarray(image.squeeze()).save(source, kind, **options)
    expected = np.asarray(Image.open(source)).reshape(20, 17, -1)  # AVIF loses a little when Pillow writes it
    report = upscale([source], 'any.pth', tmp_path / 'out', quality=100)
    assert (report.images, report.failures) == (1, {})
    result = np.asarray(Image.open(tmp_path / 'out' / source.name)).reshape(40, 34, -1).astype(int)
    colors = slice(0, 3 if channels > 1 else 1)
    levels = 4 if suffix == '.avif' else 0
    assert np.abs(result[..., colors] - repeated(expected)[..., colors]).max() <= levels
    if channels == 4:
        bicubic = cv2.resize(expected[..., 3].astype(float), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        assert np.abs(result[..., 3] - bicubic.clip(0, 255)).max() < 0.51 + levels
    report = upscale([source], 'any.pth', tmp_path / 'png', file_format='png')
    read = np.asarray(Image.open(tmp_path / 'png/image.png')).reshape(40, 34, -1)
    assert np.array_equal(read[..., colors], repeated(expected)[..., colors])


def test_all_formats_are_choices(capsys):
    with pytest.raises(SystemExit):
        run('a', '-m', 'b', '-o', 'c', '--format', 'gif')
    assert f'choose from {", ".join(FORMATS)}' in capsys.readouterr().err.replace("'", '')


@pytest.mark.parametrize('channels', [1, 3])
def test_floating_point(enlarging, tmp_path, channels):
    """As the network gives it, or as 16 bits, or 8, of what is between 0 and 1."""
    generator = np.random.default_rng(0)
    for name, image in (
        ('dark', generator.random((9, 7, channels)).astype(np.float32)),
        ('bright', generator.normal(0.5, 20, (40, 35, channels)).astype(np.float32)),
    ):
        tifffile.imwrite(
            tmp_path / f'{name}.tif', image.squeeze(), photometric='rgb' if channels == 3 else 'minisblack'
        )
        report = upscale([tmp_path / f'{name}.tif'], 'any.pth', tmp_path / 'out')
        result = tifffile.imread(tmp_path / f'out/{name}.tif').reshape(*image.shape[:2] * np.array(2), channels)
        assert result.dtype == np.float32 and np.allclose(result, repeated(image), 1e-6, 0)
        beyond = f'{name}.tif went through the network with values from {image.min():.4g} to {image.max():.4g}, where '
        assert [beyond in note for note in report.notes] == [True] * (name == 'bright')
        for file_format, peak in (('png', 65535), ('bmp', 255)):
            upscale([tmp_path / f'{name}.tif'], 'any.pth', tmp_path / 'out', file_format=file_format)
            whole = cv2.imread(str(tmp_path / f'out/{name}.{file_format}'), cv2.IMREAD_UNCHANGED)
            whole = whole.reshape(result.shape)[:, :, :: -1 if channels == 3 else 1]
            assert whole.dtype == (np.uint16 if peak == 65535 else np.uint8)
            assert np.abs(whole - result.clip(0, 1).astype(np.float64) * peak).max() < 0.51


def test_values_that_are_not_finite_do_not_stop_the_rest(enlarging, tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', np.full((5, 5), np.nan, np.float32))
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / 'b.png')
    report = upscale([tmp_path / 'a.tif', tmp_path / 'b.png'], 'any.pth', tmp_path / 'out')
    (reason,) = report.failures.values()
    assert report.images == 1 and reason.endswith(
        'a.tif must have finite values, got NaN or infinity in row 0, counted from 0.'
    )


def test_alpha_by_the_network(monkeypatch, tmp_path):
    class Inverse(Enlarge):
        def forward(self, x):
            return 1 - torch.nn.functional.interpolate(self.conv(x), scale_factor=2, mode='bicubic').clamp(0, 1)

    monkeypatch.setattr(module, 'load_network', lambda path: Inverse())
    image = pixels(20, 30, 4)
    image[..., 3] |= 1
    Image.fromarray(image).save(tmp_path / 'image.png')
    assert run(tmp_path / 'image.png', '-m', 'any.pth', '-o', tmp_path / 'out.png', '--alpha', 'network') == 0
    bicubic = cv2.resize(image[..., 3].astype(float), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC).clip(0, 255)
    assert np.abs(np.asarray(Image.open(tmp_path / 'out.png'))[..., 3] - (255 - bicubic)).max() < 0.51
    assert run(tmp_path / 'image.png', '-m', 'any.pth', '-o', tmp_path / 'plain.png') == 0
    assert np.abs(np.asarray(Image.open(tmp_path / 'plain.png'))[..., 3] - bicubic).max() < 0.51
    with pytest.raises(InputError, match='alpha must be bicubic or network, got x'):
        upscale([tmp_path / 'image.png'], 'any.pth', tmp_path / 'x.png', alpha='x')


def test_metadata_of_files(enlarging, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'Camera'
    icc = b'not a real profile, and kept all the same'
    image = pixels(6, 10, 3)
    Image.fromarray(image).save(tmp_path / 'turned.png', exif=exif, icc_profile=icc)
    for target in ('turned.png', 'turned.tif'):
        upscale([tmp_path / 'turned.png'], 'any.pth', tmp_path / 'out' / target)
        result = Image.open(tmp_path / 'out' / target)
        assert np.array_equal(np.asarray(result), repeated(np.rot90(image, -1)))
        assert result.getexif().get(0x0112, 1) == 1 and result.getexif()[0x010F] == 'Camera'
        assert result.info['icc_profile'] == icc


def test_what_is_lost_is_told_once(enlarging, tmp_path, capsys):
    text = PngImagePlugin.PngInfo()
    text.add_text('Title', 'Kept')
    (tmp_path / 'in').mkdir()
    for name in ('a.png', 'b.png'):
        Image.fromarray(pixels(5, 5, 3)).save(tmp_path / 'in' / name, pnginfo=text)
    Image.fromarray(pixels(5, 5, 3)).save(tmp_path / 'in/c.jpg', comment=b'Said')
    assert run(tmp_path / 'in', '-m', 'any.pth', '-o', tmp_path / 'same') == 0
    assert capsys.readouterr().err == ''
    assert Image.open(tmp_path / 'same/a.png').text == {'Title': 'Kept'}
    assert Image.open(tmp_path / 'same/c.jpg').info['comment'] == b'Said'
    assert run(tmp_path / 'in', '-m', 'any.pth', '-o', tmp_path / 'other', '--format', 'tiff') == 0
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert f'note: {tmp_path / "in/a.png"} and 2 more lost what could not be kept: JPEG comment, PNG text.' in err


def test_an_unspecified_channel_stays_one(enlarging, tmp_path):
    image = pixels(6, 5, 4, dtype=np.uint16)
    image[..., 3] = 0
    image[0, 0, 3] = 65535
    tifffile.imwrite(tmp_path / 'image.tif', image, photometric='rgb', extrasamples=['unspecified'])
    upscale([tmp_path / 'image.tif'], 'any.pth', tmp_path / 'out')
    with tifffile.TiffFile(tmp_path / 'out/image.tif') as file:
        assert np.array_equal(file.pages[0].asarray()[..., :3], repeated(image[..., :3]))
        assert [kind.name for kind in file.pages[0].extrasamples] == ['UNSPECIFIED']


def test_names(enlarging, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('in/b.png', 'in/A.PNG', 'in/sub/c.jpeg', 'in/sub/d.webp', 'other/e.tif'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(4, 4, 3)).save(path)
    upscale(['in'], 'any.pth', 'same')
    assert files_in(tmp_path / 'same') == ['A.PNG', 'b.png', 'sub/c.jpeg', 'sub/d.webp']
    upscale(['in/sub', 'other/e.tif'], 'any.pth', 'png', file_format='png')
    assert files_in(tmp_path / 'png') == ['c.png', 'd.png', 'e.png']
    upscale(['in/**/*e*'], 'any.pth', 'glob')
    assert files_in(tmp_path / 'glob') == ['c.jpeg', 'd.webp']
    upscale(['in/b.png'], 'any.pth', 'one/file.jpg')
    assert Image.open(tmp_path / 'one/file.jpg').format == 'JPEG'
    upscale(['in/b.png', 'in', './in/b.png'], 'any.pth', 'twice')
    assert files_in(tmp_path / 'twice') == ['A.PNG', 'b.png', 'sub/c.jpeg', 'sub/d.webp']
    upscale(['in'], 'any.pth', 'in/larger')
    upscale(['in'], 'any.pth', 'in/larger', overwrite=True)  # does not go into its own output
    assert files_in(tmp_path / 'in/larger') == ['A.PNG', 'b.png', 'sub/c.jpeg', 'sub/d.webp']


def test_quality(enlarging, tmp_path):
    Image.fromarray(pixels(40, 40, 3)).save(tmp_path / 'image.png')
    sizes = {}
    for target in ('image.jpg', 'image.jp2', 'image.avif', 'image.webp'):
        for quality in (60, 95, 100):
            upscale([tmp_path / 'image.png'], 'any.pth', tmp_path / target, quality=quality, overwrite=True)
            sizes[quality] = (tmp_path / target).stat().st_size
        assert sizes[60] < sizes[95]
    for target in ('image.webp', 'image.jp2'):  # lossless at 100
        assert np.array_equal(np.asarray(Image.open(tmp_path / target)), repeated(pixels(40, 40, 3)))


def test_what_a_format_cannot_hold_does_not_stop_the_rest(enlarging, tmp_path):
    Image.fromarray(pixels(4, 4, 4)).save(tmp_path / 'alpha.png')
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / 'plain.png')
    report = upscale([tmp_path / 'alpha.png', tmp_path / 'plain.png'], 'any.pth', tmp_path / 'out', file_format='jpeg')
    assert report.images == 1 and files_in(tmp_path / 'out') == ['plain.jpg']
    (reason,) = report.failures.values()
    assert 'alpha.png was not upscaled: JPEG cannot hold an alpha channel' in reason


def test_sides_that_a_format_cannot_hold_are_told_before_the_network_runs(enlarging, tmp_path, monkeypatch):
    Image.fromarray(pixels(1, 8192, 3)).save(tmp_path / 'wide.png')
    monkeypatch.setattr(Upscaler, '__call__', None)
    report = upscale([tmp_path / 'wide.png'], 'any.pth', tmp_path / 'out', file_format='webp')
    (reason,) = report.failures.values()
    assert 'wide.png was not upscaled: WebP cannot hold 16384 x 2 pixels' in reason and '--format png' in reason


@pytest.mark.parametrize('step', ['read_picture', '_stored', 'write_picture'])
def test_short_memory_does_not_stop_the_rest(enlarging, tmp_path, monkeypatch, step):
    for name in ('a.png', 'b.png'):
        Image.fromarray(pixels(4, 4, 3)).save(tmp_path / name)
    where = upscaler_module if step == '_stored' else module
    original, calls = getattr(where, step), []

    def fail_once(*args):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(where, step, fail_once)
    report = upscale([tmp_path / 'a.png', tmp_path / 'b.png'], 'any.pth', tmp_path / 'out')
    (reason,) = report.failures.values()
    assert report.images == 1 and reason.endswith('it needs more memory than there is.')


@pytest.mark.parametrize(
    'name', ['a.png', 'a.jpg', 'a.webp', 'a.tif', 'float.tif', 'a.bmp', 'a.tga', 'a.jp2', 'a.j2k', 'a.avif']
)
def test_large_results_are_written_as_they_are_made(checkpoint, tmp_path, monkeypatch, name):
    """The file is the one that is written at once."""
    image = pixels(90, 70, 3 if name == 'a.jpg' else 4)
    if name == 'float.tif':
        tifffile.imwrite(tmp_path / name, image.astype(np.float32) / 99, photometric='rgb', extrasamples=['unassalpha'])
    else:
        Image.fromarray(image).save(tmp_path / name)
    upscale([tmp_path / name], checkpoint, tmp_path / 'whole', tile=60)
    monkeypatch.setattr(module, 'WHOLE_BYTES', 0)
    seen = []
    original = Upscaler.bands
    monkeypatch.setattr(Upscaler, 'bands', lambda *args: (seen.append(len(band)) or band for band in original(*args)))
    monkeypatch.setattr(Upscaler, '__call__', None)
    report = upscale([tmp_path / name], checkpoint, tmp_path / 'bands', tile=60)
    assert report.images == 1 and len(seen) > 1 and sum(seen) == 180
    assert (tmp_path / 'bands' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


def test_a_large_result_that_fails_leaves_nothing(enlarging, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'WHOLE_BYTES', 0)
    for name in ('a.png', 'b.png', 'c.png'):
        Image.fromarray(pixels(20, 20, 3)).save(tmp_path / name)
    original, calls = upscaler_module._stored, []

    def fail_once(*args):
        calls.append(1)
        if len(calls) == 3:  # when the first rows are in the file
            raise RuntimeError('DefaultCPUAllocator: not enough memory')
        return original(*args)

    monkeypatch.setattr(upscaler_module, '_stored', fail_once)
    out = tmp_path / 'out'
    report = upscale([tmp_path / name for name in ('a.png', 'b.png', 'c.png')], 'any.pth', out, tile=11)
    assert files_in(out) == ['b.png', 'c.png'] and report.images == 2
    (reason,) = report.failures.values()
    assert reason.endswith('a.png cannot be upscaled: DefaultCPUAllocator: not enough memory. A smaller --tile helps.')


@pytest.mark.parametrize('error', [TypeError, ValueError])
def test_a_fault_of_the_network_is_no_fault_of_the_image(enlarging, tmp_path, monkeypatch, error):
    """Also where its result is written while it is made."""

    def fail(*_):
        raise error('of the network')

    Image.fromarray(pixels(20, 20, 3)).save(tmp_path / 'a.png')
    monkeypatch.setattr(upscaler_module, '_stored', fail)
    for most in (module.WHOLE_BYTES, 0):
        monkeypatch.setattr(module, 'WHOLE_BYTES', most)
        with pytest.raises(error, match='^of the network$'):
            upscale([tmp_path / 'a.png'], 'any.pth', tmp_path / 'out')
        assert not (tmp_path / 'out').exists()


def test_what_describes_an_image_does_not_stop_the_rest(enlarging, tmp_path, monkeypatch):
    """Whatever a library makes of it."""
    for name in ('a.png', 'b.png'):
        Image.fromarray(pixels(20, 20, 3)).save(tmp_path / name)
    original = module.write_picture

    def fail_once(file, *arguments):
        if '.a.' in file.name:
            raise OverflowError('cannot convert float infinity to integer')
        original(file, *arguments)

    monkeypatch.setattr(module, 'write_picture', fail_once)
    report = upscale([tmp_path / 'a.png', tmp_path / 'b.png'], 'any.pth', tmp_path / 'out')
    assert files_in(tmp_path / 'out') == ['b.png']
    (reason,) = report.failures.values()
    assert reason.endswith('a.png was not written: OverflowError, cannot convert float infinity to integer.')


def test_names_in_a_folder_make_no_lines(enlarging, tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a\x1b[31m\nlora-sr: error: forged.png').write_bytes(b'x')
    assert run(tmp_path / 'in', '-m', 'any.pth', '-o', tmp_path / 'out') == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and err[:-1].isprintable() and 'a\\x1b[31m\\nlora-sr: error: forged.png' in err


def test_a_full_disk_stops_large_results_too(enlarging, tmp_path, monkeypatch):
    Image.fromarray(pixels(20, 20, 3)).save(tmp_path / 'a.png')
    monkeypatch.setattr(module, 'WHOLE_BYTES', 0)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(module, 'write_picture', full)
    with pytest.raises(InputError, match=r'The output .*a.png cannot be written: No space left on device'):
        upscale([tmp_path / 'a.png'], 'any.pth', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_adapters_as_adapter_merge_mixes_them(checkpoint, tmp_path):
    Image.fromarray(pixels(16, 16, 3)).save(tmp_path / 'image.png')
    adapters = []
    for number, weight in ((1, 0.7), (2, -0.4)):
        network = load_network(checkpoint)
        add_lora(network, LoRAConfig([r'block_\d\..*'], rank=number))
        torch.manual_seed(number)
        for _, layer in lora_layers(network):
            nn.init.normal_(layer.lora_B, std=0.1)
        save_adapter(network, tmp_path / f'{number}.safetensors')
        adapters.append((tmp_path / f'{number}.safetensors', weight))
    merge_adapters(checkpoint, adapters, tmp_path / 'merged.pth')
    upscale([tmp_path / 'image.png'], tmp_path / 'merged.pth', tmp_path / 'merged.png')
    named = [f'--adapter={path}={weight}' for path, weight in adapters]
    assert run(tmp_path / 'image.png', '-m', checkpoint, '-o', tmp_path / 'mixed.png', *named) == 0
    upscale([tmp_path / 'image.png'], checkpoint, tmp_path / 'plain.png')
    merged, mixed, plain = (
        np.asarray(Image.open(tmp_path / f'{name}.png')).astype(int) for name in ('merged', 'mixed', 'plain')
    )
    assert np.abs(merged - mixed).max() <= 1 and np.abs(merged - plain).max() > 10

    training = tmp_path / 'training.pth'
    torch.save({'params': SPAN(feature_channels=6, upscale=2).state_dict()}, training)
    adapted = tmp_path / 'adapted.pth'
    torch.save({'params': DSCLoRA(feature_channels=6, upscale=2, rank=2).state_dict()}, adapted)
    for model, words in (
        (training, 'not fit the base .*the base has branches'),
        (adapted, 'carries LoRA already'),
    ):
        with pytest.raises(InputError, match=words):
            upscale([tmp_path / 'image.png'], NetworkSource(model, adapters=adapters), tmp_path / 'refused.png')


def test_weights_of_adapters():
    assert weighted('a.safetensors') == ('a.safetensors', None)
    assert weighted('C:/a.safetensors=-0.5') == ('C:/a.safetensors', -0.5)
    for wrong in ('a.safetensors=', 'a.safetensors=x', '=1', 'a.safetensors=nan'):
        with pytest.raises(argparse.ArgumentTypeError, match='should be FILE or FILE=WEIGHT'):
            weighted(wrong)


# What is refused, and what is left behind


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('in/a.png', 'in/b.png', 'in/sub/a.png'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(5, 5, 3)).save(path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('text')
    os.mkfifo(tmp_path / 'pipe.png')
    return tmp_path


@pytest.mark.parametrize(
    'inputs, output, options, words',
    [
        (['missing.png'], 'out', {}, 'There is no file or folder missing.png'),
        (['*.jpg'], 'out', {}, r'\*.jpg has no images'),
        (['empty'], 'out', {}, 'empty has no images'),
        (['in'], 'in', {}, 'The output in/a.png is the input in/a.png'),
        (['in'], 'in', {'overwrite': True}, 'The output in/a.png is the input in/a.png'),
        (['in/a.png', 'in/sub/a.png'], 'out', {}, 'in/a.png and in/sub/a.png would have the same output, out/a.png'),
        (['in'], 'out.png', {}, 'The output out.png is a file, where a folder is right'),
        (['in/a.png', 'in/b.png'], 'out.png', {}, 'The output out.png is a file, where a folder is right'),
        (['in/a.png'], 'file', {}, 'The output file is a file, where a folder is right'),
        (['in/a.png'], 'file/deeper', {}, 'The output folder file/deeper cannot be written: Not a directory'),
        (['in/a.png'], 'out.png', {'file_format': 'jpeg'}, 'The output out.png is no jpeg file'),
        (['in/a.png'], 'in/sub', {}, 'The output in/sub/a.png exists'),
        ([''], 'out', {}, 'An input is empty'),
        (['in/a.png'], '', {}, 'The output is empty'),
        (['in/a.png'], 'out.gif', {}, 'The output out.gif ends in .gif, where .png, .jpg, .* are right for a file'),
        (['pipe.png'], 'out', {}, 'pipe.png is neither a file nor a folder'),
        (['in/a.png'], 'out', {'quality': 0}, 'The quality is 0'),
        (['in/a.png'], 'out', {'tile': 3}, 'A tile of 3 is too small for SPAN'),
        (['in/a.png'], 'out', {'model': 'file'}, 'file'),
        (['in/a.png'], 'out', {'model': 'missing.pth'}, 'missing.pth'),
    ],
)
def test_wrong_calls_leave_nothing_behind(images, checkpoint, inputs, output, options, words):
    before = sorted(images.rglob('*'))
    content = {path: path.read_bytes() for path in before if path.is_file()}
    with pytest.raises(InputError, match=words) as caught:
        upscale(inputs, **{'model': checkpoint, 'output': output, **options})
    assert '\n' not in str(caught.value)
    assert sorted(images.rglob('*')) == before
    assert all(path.read_bytes() == value for path, value in content.items())


def test_an_unknown_family_is_named(images):
    torch.save({'params': {'strange.weight': torch.zeros(3)}}, images / 'strange.pth')
    with pytest.raises(InputError, match='strange.pth belongs to no network known here'):
        upscale(['in'], 'strange.pth', 'out')
    assert not (images / 'out').exists()
    assert run('in', '-m', 'strange.pth', '-o', 'out') == 2


@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_the_input_is_never_replaced_through_links(images, enlarging, link):
    (images / 'out').mkdir()
    link(images / 'in/a.png', images / 'out/b.png')  # the output of another input
    before = (images / 'in/a.png').read_bytes()
    with pytest.raises(InputError, match='The output out/b.png is the input in/a.png'):
        upscale(['in/a.png', 'in/b.png'], 'any.pth', 'out', overwrite=True)
    os.symlink(images / 'in', images / 'linked')
    with pytest.raises(InputError, match='is the input'):
        upscale(['in'], 'any.pth', 'linked', overwrite=True)
    assert (images / 'in/a.png').read_bytes() == before


def test_pipes_in_a_folder_are_not_waited_for(images, enlarging):
    os.mkfifo(images / 'in/pipe.png')
    os.symlink(images / 'nowhere', images / 'in/link.png')
    report = upscale(['in'], 'any.pth', 'out')
    assert report.images == 3 and list(report.failures) == ['in/link.png']


def test_folders_with_a_dot(images, enlarging):
    upscale(['in'], 'any.pth', 'out.x2')
    assert files_in(images / 'out.x2') == ['a.png', 'b.png', 'sub/a.png']
    upscale(['in/a.png'], 'any.pth', 'out.x2', overwrite=True)


def test_existing_outputs_need_overwrite(images, enlarging):
    upscale(['in'], 'any.pth', 'out')
    with pytest.raises(InputError, match='The output out/a.png and 2 more exist: .* --overwrite'):
        upscale(['in'], 'any.pth', 'out')
    (images / 'out/a.png').write_text('old')
    upscale(['in'], 'any.pth', 'out', overwrite=True)
    assert Image.open(images / 'out/a.png').size == (10, 10)


def test_a_stopped_run_goes_on_with_skip_existing(images, enlarging, monkeypatch, capsys):
    with pytest.raises(InputError, match='exists: .* --skip-existing'):
        upscale(['in/a.png'], 'any.pth', 'in/sub')
    (images / 'out').mkdir()
    (images / f'out/.b.{"0" * 16}.partial.png').write_text('half')  # left by a run that was killed
    upscale(['in'], 'any.pth', 'out')
    (images / 'out/a.png').write_text('old')
    (images / 'out/b.png').unlink()
    assert run('in', '-m', 'any.pth', '-o', 'out', '--skip-existing') == 0
    out, err = capsys.readouterr()
    assert out.startswith('1 image in ') and 'lora-sr: note: 2 images skipped, as the output exists.' in err
    assert files_in(images / 'out') == ['a.png', 'b.png', 'sub/a.png']
    assert (images / 'out/a.png').read_text() == 'old' and Image.open(images / 'out/b.png').size == (10, 10)
    monkeypatch.setattr(module, 'load_network', None)  # nothing is left for it
    report = upscale(['in'], 'any.pth', 'out', skip_existing=True)
    assert report.images == 0 and report.notes == ['3 images skipped, as the output exists.']
    with pytest.raises(InputError, match='replaced with --overwrite or kept with --skip-existing, not both'):
        upscale(['in'], 'any.pth', 'out', overwrite=True, skip_existing=True)
    with pytest.raises(InputError, match='The output in/a.png is the input in/a.png'):
        upscale(['in'], 'any.pth', 'in', skip_existing=True)


def test_a_text_file_among_images(images, enlarging, capsys):
    assert run('file', 'in/a.png', '-m', 'any.pth', '-o', 'out') == 1
    out, err = capsys.readouterr()
    assert 'lora-sr: error: file is no image by its name, which should end in .png, .jpg' in err
    assert out.startswith('1 image in') and files_in(images / 'out') == ['a.png']


def test_full_disk_leaves_no_partial_file(images, enlarging):
    """A limit on the size of files is as good as a full disk."""
    Image.fromarray(pixels(300, 300, 3)).save(images / 'in/c.png')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match='The output out/c.png cannot be written: File too large'):
            upscale(['in/a.png', 'in/c.png'], 'any.pth', 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(images / 'out') == ['a.png']


def test_no_permission_is_told_before_the_network_is_loaded(images, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(module.tempfile, 'TemporaryFile', refuse)
    monkeypatch.setattr(module, 'load_network', None)
    with pytest.raises(InputError, match='The output folder out cannot be written: Permission denied'):
        upscale(['in'], 'any.pth', 'out')
    assert not (images / 'out').exists()


def test_interrupting_leaves_whole_files(images, monkeypatch, capsys):
    class Interrupted(Enlarge):
        def forward(self, x):
            if x.shape[-1] == 77:
                raise KeyboardInterrupt
            return super().forward(x)

    monkeypatch.setattr(module, 'load_network', lambda path: Interrupted())
    Image.fromarray(pixels(5, 77, 3)).save(images / 'in/b.png')
    assert run('in', '-m', 'any.pth', '-o', 'out') == 130
    assert 'interrupted' in capsys.readouterr().err
    assert set(files_in(images / 'out')) <= {'a.png'}
    for name in files_in(images / 'out'):
        Image.open(images / 'out' / name).load()


def test_few_images_wait(images, enlarging, monkeypatch):
    """However slow the writing is beside the network, no more than a few results are in memory."""
    gate, made, by_then = threading.Event(), [], []
    write = module._write

    def slow(*args):
        gate.wait(20)
        return write(*args)

    class Counting(Upscaler):
        def __call__(self, *args):
            made.append(1)
            return super().__call__(*args)

    monkeypatch.setattr(module, '_write', slow)
    monkeypatch.setattr(module, 'Upscaler', Counting)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 0)
    for number in range(100):
        shutil.copy(images / 'in/a.png', images / f'in/{number:02}.png')
    threading.Timer(0.5, lambda: (by_then.append(len(made)), gate.set())).start()
    assert upscale(['in'], 'any.pth', 'out').images == 103
    assert by_then == [min(103, len(os.sched_getaffinity(0)) + 2)]


def test_bursts_of_writing(images, enlarging, monkeypatch):
    """Where the network takes all cores, it pauses for writing, before too many results wait."""
    events = []
    write = module._write

    class Noting(Upscaler):
        def __call__(self, *args):
            events.append('run')
            result = super().__call__(*args)
            events.append('ran')
            return result

    def noting(*args):
        events.append('write')
        return write(*args)

    monkeypatch.setattr(module, '_write', noting)
    monkeypatch.setattr(module, 'Upscaler', Noting)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1 << 20)
    for number in range(7):
        shutil.copy(images / 'in/a.png', images / f'in/{number}.png')  # ten in all, of 300 bytes when upscaled
    made = ['run', 'ran']
    for seconds, waiting, expected in (
        (1e9, 1 << 30, 10 * made + 10 * ['write']),
        (0, 1 << 30, 10 * [*made, 'write']),
        (1e9, 1000, 2 * (4 * made + 4 * ['write']) + 2 * made + 2 * ['write']),
    ):
        monkeypatch.setattr(module, 'BURST_SECONDS', seconds)
        monkeypatch.setattr(module, 'WAITING_BYTES', waiting)
        events.clear()
        upscale(['in'], 'any.pth', 'out', overwrite=True)
        assert events == expected
    assert len(files_in(images / 'out')) == 10


def test_report_of_networks_that_look_at_the_whole_image(images, monkeypatch, capsys):
    class Mean(Enlarge):
        def forward(self, x):
            return super().forward(x) + 0.1 * x.mean((2, 3), keepdim=True)

    monkeypatch.setattr(module, 'load_network', lambda path: Mean())
    assert run('in', '-m', 'any.pth', '-o', 'out', '--tile', 200) == 0
    assert 'note: Mean looks at the whole image' in capsys.readouterr().err
