"""`lora-sr upscale`: the formats of images, what else is in their files, and their names."""

import cv2
import numpy as np
import pytest
import tifffile
import torch
from enlarging import Enlarge, pixels, repeated
from PIL import Image, PngImagePlugin
from upscaling import files_in, run

from lora_sr.deploy import upscale as module
from lora_sr.deploy.upscale import upscale
from lora_sr.errors import InputError
from lora_sr.images.formats import FORMATS
from lora_sr.runtime.upscaler import Upscaler


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
