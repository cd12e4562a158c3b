"""A "camera" degradation that gives the same LR image everywhere: blur, sampling, sensor noise and JPEG.

Published LR images are clean bicubic copies of HR images; what a camera writes is not. Here an image is blurred by an
anisotropic Gaussian and sampled; shot and read noise are added in linear light; the result is compressed. How strong
each step is, is drawn for each image. Blur and sampling act on sRGB values, as in the published degradations: in linear
light they would brighten fine texture, a shift that has nothing to do with resolution and would outweigh the rest.

Everything that is drawn comes from the seed alone, so an image is the same in every run, whatever the order and the
number of threads. The random bits are Philox's raw output, which NumPy guarantees to stay the same (its distributions
may change between versions: NEP 19); uniform and normal values are made of them here. The sums of blur and sampling are
taken in one fixed order in float64. What may differ between machines is the last bits of ``exp``, ``log``, ``cos`` and
powers, which turn a gray level only where a value lies on the very edge between two, and the JPEG library:
libjpeg-turbo, which OpenCV's wheels bring along, gives the same on every processor; another library may be some gray
levels off here and there.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from dataclasses import dataclass

import cv2
import numpy as np

from lora_sr.errors import InputError
from lora_sr.images.bicubic import MAX_SCALE, resampling_weights


@dataclass(frozen=True)
class CameraRanges:
    """What the degradation of an image is drawn from, as (least, greatest): a phone's photograph in fair light.

    Attributes:
        blur_sigma: the two standard deviations of the Gaussian, in LR pixels, each drawn uniformly; its angle is
            uniform. This blur comes on top of bicubic sampling. At scale 4 the defaults are 0.8 to 2 HR pixels; 1.8
            is what Figure 1 of IKC shows kernel mismatch with (Gu et al., CVPR 2019).
        shot_gain: variance of the shot noise for each unit of signal, where white is 1; drawn log-uniformly. Brooks et
            al. ("Unprocessing Images for Learned Raw Denoising", CVPR 2019) take 1e-4 to 1.2e-2; the upper half of
            that, dim light, is left out.
        read_sigma: standard deviation of the read noise, where white is 1; drawn log-uniformly. About what the same
            paper finds beside these gains.
        jpeg_quality: a whole number, both ends included: from a messenger's files to a camera's.
    """

    blur_sigma: tuple[float, float] = (0.2, 0.5)
    shot_gain: tuple[float, float] = (1e-4, 1e-3)
    read_sigma: tuple[float, float] = (1e-4, 1e-3)
    jpeg_quality: tuple[int, int] = (80, 95)


def camera_seed(name: str, seed: int = 0) -> int:
    """The seed of one image.

    Args:
        name: the file's name without folder and extension. Composed and decomposed accents are the same.
        seed: the user's seed: another one gives another dataset.

    Returns:
        A whole number of 128 bits.
    """
    # A name need not be text: Python has a letter of its own for each byte that is none.
    text = f'{seed} {unicodedata.normalize("NFC", name)}'
    return int.from_bytes(hashlib.sha256(text.encode(errors='surrogatepass')).digest()[:16], 'big')


def camera_degradation(image: np.ndarray, scale: int, seed: int, ranges: CameraRanges = CameraRanges()) -> np.ndarray:
    """Make the LR image that a camera might have taken of an HR image.

    The pixels lie where bicubic's do: LR pixel i covers HR pixels ``scale * i`` to ``scale * i + scale - 1``.

    Args:
        image: uint8 or uint16 of shape (height, width, 3), BGR, over the whole range of the type, sRGB's curve; both
            sides are multiples of ``scale``.
        scale: a whole number from 2 to 16.
        seed: a whole number from 0 to 2^128 - 1; see ``camera_seed``.
        ranges: what the strength of each step is drawn from.

    Returns:
        uint8 of shape (height / scale, width / scale, 3), BGR: JPEG has 8 bits, whatever the image has.

    Raises:
        InputError: if the image is not of that type and shape, or the scale is out of range.
    """
    if scale != int(scale) or not 2 <= scale <= MAX_SCALE:
        raise InputError(
            f'The scale of the camera degradation must be a whole number from 2 to {MAX_SCALE}, got {scale}.'
        )
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(
            'The image of the camera degradation must have 8-bit or 16-bit values of shape (height, width, 3), got '
            f'{image.dtype} of shape {image.shape}.'
        )
    scale = int(scale)
    if image.shape[0] % scale or image.shape[1] % scale:
        raise InputError(
            f'The sides of the image of the camera degradation must be multiples of the scale {scale}, got '
            f'{image.shape[1]} x {image.shape[0]} pixels (width x height).'
        )
    bits = np.random.Philox(key=seed)
    # The order of the draws is part of the result.
    sigma_1, sigma_2, angle, shot, read, quality = _uniform(bits, 6)
    sigma_1, sigma_2 = (_between(ranges.blur_sigma, draw) * scale for draw in (sigma_1, sigma_2))
    gain = _log_between(ranges.shot_gain, shot)
    read_sigma = _log_between(ranges.read_sigma, read)
    least, greatest = ranges.jpeg_quality

    most = np.iinfo(image.dtype).max
    small = _sample(image, scale, _gaussian(sigma_1, sigma_2, math.pi * angle)) / most
    light = _srgb_to_linear(np.clip(small, 0, 1))
    # White is some thousand photons: so many that Poisson's distribution is a normal one whose variance is the signal.
    deviation = np.sqrt(gain * light + read_sigma**2)
    light += deviation * _normal(bits, light.size).reshape(light.shape)
    small = np.rint(255 * _linear_to_srgb(np.clip(light, 0, 1))).astype(np.uint8)
    return _jpeg(small, least + int(quality * (greatest - least + 1)))


def _uniform(bits: np.random.Philox, count: int) -> np.ndarray:
    """Values of 53 random bits in [0, 1)."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _normal(bits: np.random.Philox, count: int) -> np.ndarray:
    """Standard normal values, by Box and Muller's transform."""
    pairs = (count + 1) // 2
    radius = np.sqrt(-2 * np.log(1 - _uniform(bits, pairs)))
    angle = 2 * np.pi * _uniform(bits, pairs)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _log_between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] * (limits[1] / limits[0]) ** draw


def _gaussian(sigma_1: float, sigma_2: float, angle: float) -> np.ndarray:
    """A Gaussian of sum 1 on a square of pixels, cut at three standard deviations; the angle turns its first axis."""
    radius = math.ceil(3 * max(sigma_1, sigma_2))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-((along / sigma_1) ** 2 + (across / sigma_2) ** 2) / 2)
    return kernel / kernel.sum()


def _sample(image: np.ndarray, scale: int, blur: np.ndarray) -> np.ndarray:
    """Blur and shrink by bicubic in one sum over the HR pixels around each LR pixel; mirrored at the borders.

    Args:
        image: uint8 or uint16 of shape (height, width, channels), multiples of ``scale``.
        scale: the scale.
        blur: a kernel with an odd number of rows and columns.

    Returns:
        float64 of shape (height / scale, width / scale, channels), on the image's scale of values.
    """
    ((first, weights),), denominator = resampling_weights(scale, shrink=True)
    taps = np.array(weights) / denominator
    radius = len(blur) // 2
    kernel = np.zeros([len(blur) + len(taps) - 1] * 2)
    for row, column in np.ndindex(len(taps), len(taps)):
        kernel[row : row + len(blur), column : column + len(blur)] += taps[row] * taps[column] * blur
    height, width = (length // scale for length in image.shape[:2])
    before = radius - first
    after = max(len(kernel) - before, 0) + scale
    padded = np.pad(image, ((before, after), (before, after), (0, 0)), mode='symmetric')
    # By its place within the LR pixel: what one tap of the kernel meets then lies in runs of memory.
    padded = padded[: len(padded) // scale * scale, : padded.shape[1] // scale * scale]
    phases = padded.reshape(len(padded) // scale, scale, padded.shape[1] // scale, scale, -1).transpose(1, 3, 0, 2, 4)
    phases = np.ascontiguousarray(phases)
    total = np.zeros((height, width, image.shape[2]))
    term = np.empty_like(total)
    for row, column in np.ndindex(*kernel.shape):
        source = phases[row % scale, column % scale, row // scale :, column // scale :][:height, :width]
        np.multiply(source, kernel[row, column], out=term)
        total += term
    return total


def _linear_to_srgb(light: np.ndarray) -> np.ndarray:
    """sRGB's curve (IEC 61966-2-1) on values from 0 to 1."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def _srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Through a JPEG file, and back. Baseline with half the resolution in color (4:2:0) is what OpenCV writes."""
    compressed = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(compressed, cv2.IMREAD_COLOR)
    assert decoded is not None  # OpenCV reads what it has written
    return decoded
