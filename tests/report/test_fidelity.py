"""PSNR and SSIM, against BasicSR's own functions."""

import math

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr, calculate_ssim

from lora_sr.report.fidelity import Fidelity, mean_fidelity, measure_fidelity


def pictures(height, width, count=3):
    """An original, and versions of it from close to far."""
    rng = np.random.default_rng(0)
    original = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 1.5)
    noises = (rng.normal(0, 4**index, original.shape) for index in range(count))
    return original, {f'{i}': np.clip(original + noise, 0, 255).astype(np.uint8) for i, noise in enumerate(noises)}


@pytest.mark.parametrize('border, size', [(4, (61, 83)), (0, (40, 33)), (3, (17, 18))])
def test_measures_are_those_of_basicsr(border, size):
    original, versions = pictures(*size)
    found = measure_fidelity(versions, original, border, rgb=True)
    assert list(found) == list(versions)
    for name, version in versions.items():
        for is_luma, ours in (
            (True, (found[name].psnr, found[name].ssim)),
            (False, (found[name].psnr_rgb, found[name].ssim_rgb)),
        ):
            theirs = [metric(version, original, border, test_y_channel=is_luma) for metric in METRICS]
            assert ours == pytest.approx(theirs, abs=1e-9)


METRICS = (calculate_psnr, calculate_ssim)


def test_an_equal_image_is_infinitely_close_and_rgb_is_left_out_unasked():
    original, _ = pictures(30, 30)
    assert measure_fidelity({'same': original}, original, 2)['same'] == Fidelity(math.inf, 1.0)


def test_means_are_over_images():
    assert mean_fidelity([Fidelity(20, 0.5), Fidelity(30, 0.75)]) == Fidelity(25, 0.625)
    assert mean_fidelity([Fidelity(1, 2, 3, 4), Fidelity(3, 4, 5, 6)]) == Fidelity(2, 3, 4, 5)
