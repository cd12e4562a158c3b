"""`lora-sr upscale`: what becomes of images, of large ones, and of those that fail."""

import argparse

import cv2
import numpy as np
import pytest
import tifffile
import torch
from enlarging import pixels, repeated
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import nn
from upscaling import files_in, run

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, lora_layers, save_adapter
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import NetworkSource
from lora_sr.cli.arguments import weighted
from lora_sr.deploy import upscale as module
from lora_sr.deploy.adapters import merge_adapters
from lora_sr.deploy.upscale import upscale
from lora_sr.errors import InputError
from lora_sr.runtime import upscaler as upscaler_module
from lora_sr.runtime.upscaler import Upscaler


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
