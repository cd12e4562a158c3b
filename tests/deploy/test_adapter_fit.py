"""`lora-sr adapter --fit`: the weights of a mix that serve pairs of images best."""

import re

import cv2
import numpy as np
import pytest
import torch
from adapter_files import OfOnesOwn, adapt, load, option_file, run, write_pairs
from basicsr.archs.srresnet_arch import MSRResNet

from lora_sr.adapters import (
    LoRAConfig,
    merge_adapter,
    mix_adapters,
    read_adapter,
    save_adapter,
)
from lora_sr.archs.span import SPAN
from lora_sr.deploy import mixing
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.report.comparison import compare


def test_fit_finds_the_weights_that_made_the_images(files, capsys):
    folder, base = files
    adapters = [folder / 'a.safetensors', folder / 'b.safetensors']
    mix = [f'{path}={weight}' for path, weight in zip(adapters, (0.7, -0.2))]
    assert run('merge', folder / 'base.pth', *mix, '-o', folder / 'truth.pth') == 0
    fit = write_pairs(folder, load(base, folder / 'truth.pth'))
    if type(base) is OfOnesOwn:
        fit += option_file(folder, base)
    capsys.readouterr()
    assert run('merge', folder / 'base.pth', *adapters, '-o', folder / 'fitted.pth', *fit) == 0
    printed = capsys.readouterr().out
    weights = [float(text) for text in re.findall(r'weight (-?[\d.]+)', printed)]
    assert weights == pytest.approx([0.7, -0.2], abs=1e-2)
    start, before, after = (float(text) for text in re.findall(r'([\d.]+|inf) dB', printed))
    assert 'on 3 images' in printed and after > before + 20

    # The printed PSNR is that of the files, with equal weights and with those that were found.
    if type(base) is MSRResNet:
        half = [f'{path}=0.5' for path in adapters]
        assert run('merge', folder / 'base.pth', *half, '-o', folder / 'half.pth') == 0
        checkpoints = {name: folder / f'{name}.pth' for name in ('base', 'half', 'fitted')}
        # Another memory format rounds differently, which a PSNR of 80 dB shows.
        rows = compare(checkpoints, {'pairs': (folder / 'gt', folder / 'lr')}).rows
        assert [row.quality['pairs'].psnr for row in rows[1:]] == pytest.approx([start, before, after], rel=3e-4)


def test_fit_is_never_worse_than_its_start(files, capsys):
    """It begins at the given weights, here at the best ones; and an adapter twice is one of the sum of the weights."""
    folder, base = files
    fit = write_pairs(folder, load(base, folder / 'base.pth')) + option_file(folder, base)
    a = folder / 'a.safetensors'
    assert run('apply', folder / 'base.pth', f'{a}=0', '-o', folder / 'same.pth', *fit) == 0
    printed = capsys.readouterr().out
    assert 'weight 0.0000' in printed and printed.count('inf dB') == 3
    assert run('merge', folder / 'base.pth', f'{a}=0.4', f'{a}=0.2', '-o', folder / 'twice.pth', '--force', *fit) == 0
    weights = [float(text) for text in re.findall(r'weight (-?[\d.]+)', capsys.readouterr().out)]
    assert weights == pytest.approx([0.1, -0.1], abs=1e-2)


def test_fit_finds_the_best_mean_psnr(files):
    """Against a scan, for two images that want different weights: the one with little noise counts for more."""
    folder, base = files
    adapter = read_adapter(folder / 'a.safetensors')
    write_pairs(folder, load(base, folder / 'base.pth'), count=2)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    rng = np.random.default_rng(0)

    def outputs(weight):
        base.load_state_dict(merge_adapter(start, mix_adapters([(adapter, weight)])))
        images = [cv2.imread(str(folder / 'lr' / f'{i}.png'))[:, :, ::-1] for i in range(2)]
        tensors = [torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))[None] for image in images]
        return [base(x)[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy() for x in tensors]

    for i, (weight, noise) in enumerate([(0.2, 3), (0.8, 12)]):
        image = outputs(weight)[i]
        image = np.clip(np.round(image + rng.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / 'gt' / f'{i}.png'), image[:, :, ::-1])
    truth = [cv2.imread(str(folder / 'gt' / f'{i}.png'))[:, :, ::-1].astype(float) for i in range(2)]
    luma = np.array([65.481, 128.553, 24.966]) / 255  # ITU-R BT.601

    def psnr(weight):
        errors = [((a - b)[2:-2, 2:-2] @ luma) for a, b in zip(outputs(weight), truth)]
        return np.mean([10 * np.log10(255**2 / np.square(error).mean()) for error in errors])

    best = max(psnr(weight) for weight in np.arange(-0.5, 1.5, 0.05))
    base.load_state_dict(start)
    fitted = mixing.fit_mix(base, [adapter], [1.0], folder / 'gt', folder / 'lr', 2)
    assert fitted.psnr_before == pytest.approx(psnr(1.0), abs=1e-3) and fitted.psnr_before < best - 0.5
    assert fitted.psnr_after == pytest.approx(psnr(fitted.weights[0]), abs=1e-3)
    assert fitted.psnr_after > best - 0.05  # it looks at R, G and B, the scan at Y


def test_fit_makes_the_lr_images_that_are_not_given(files):
    """Those that `lora-sr prepare` and `compare` make, which tests hold against MATLAB's; of odd sizes as well."""
    folder, base = files
    adapter = read_adapter(folder / 'a.safetensors')
    write_pairs(folder, base)
    for path in (folder / 'gt').iterdir():
        image = cv2.imread(str(path))
        cv2.imwrite(str(folder / 'lr' / path.name), bicubic_downscale(image, 2))
        cv2.imwrite(str(path), cv2.copyMakeBorder(image, 0, 1, 0, 1, cv2.BORDER_REPLICATE))
    given, made = (mixing.fit_mix(base, [adapter], [1.0], folder / 'gt', lr, 2) for lr in (folder / 'lr', None))
    assert made == given and made.psnr_after > made.psnr_before


def test_fit_takes_an_option_file_whose_network_has_lora(tmp_path, capsys):
    torch.manual_seed(0)
    base = SPAN(feature_channels=6, deploy=True).eval()
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    write_pairs(tmp_path, base, 1, 4)
    save_adapter(adapt(base, LoRAConfig(['conv_cat']), 0), tmp_path / 'a.safetensors')
    (tmp_path / 'o.yml').write_text('network_g: {type: DSCLoRA, feature_channels: 6, rank: 2}\n')
    fit = ['--fit', '--gt', tmp_path / 'gt', '--lr', tmp_path / 'lr', '--scale', 4, '-opt', tmp_path / 'o.yml']
    assert run('merge', tmp_path / 'base.pth', tmp_path / 'a.safetensors', '-o', tmp_path / 'm.pth', *fit) == 0
    assert capsys.readouterr().out.count('weight ') == 1


def test_fit_leaves_the_network_as_it_was_and_takes_no_step_that_is_worse(files, monkeypatch):
    folder, base = files
    write_pairs(folder, load(base, folder / 'base.pth'))
    adapter = read_adapter(folder / 'a.safetensors')
    before = {key: value.clone() for key, value in base.state_dict().items()}
    monkeypatch.setattr(mixing._Search, 'step', lambda search, weights: torch.ones(1, dtype=torch.float64))
    fitted = mixing.fit_mix(base, [adapter], [0.2], folder / 'gt', folder / 'lr', 2)
    assert fitted.weights == [0.2] and fitted.psnr_before == fitted.psnr_after
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
