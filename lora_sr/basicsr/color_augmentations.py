"""Colors that photographs lack: augmentations of pairs that hold for outputs of a teacher as well.

Downscaling is linear and treats all channels alike, so what is done to the colors of an image may be done to its LR
image and to what a teacher made of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_sr.basicsr.integer_images import TAUGHT_HIGH, TAUGHT_LOW
from lora_sr.errors import InputError

PEAK = 65535


class ColorAugmentation:
    """Permuted channels and blends, as the section of a dataset has them.

    Source: RGB permutation and Blend of CutBlur (arXiv:2004.00448), section 2.

    Args:
        opt: The section: ``use_rgb_permutation``; ``blend_prob``, how often a patch is mixed with a random color, and
            ``blend_alpha``, the least share that it keeps. Shares and colors come equally often.
        channels: Of the LR images, and of the GT images where there are any.

    Attributes:
        needs_16_bits: Whether patches have to be uint16: a blend has finer steps than those of 8 bits.

    Raises:
        InputError: Other than three channels are to be permuted, or images of different channels to be blended.
    """

    def __init__(self, opt: Mapping[str, Any], *channels: int):
        self._permutes = bool(opt.get('use_rgb_permutation'))
        self._blends = opt.get('blend_prob') or 0
        self._least_share = opt.get('blend_alpha', 0.6)
        self._channels = channels[0]
        self.needs_16_bits = self._blends > 0
        other = next((count for count in channels if count != 3), 3)
        if self._permutes and other != 3:
            raise InputError(f'use_rgb_permutation must be false for images of {other} channels, got true')
        if self._blends and len(set(channels)) > 1:
            raise InputError(
                f'blend_prob must be 0 for LR images of {channels[0]} channels and GT images of {channels[1]}, got '
                f'{self._blends}'
            )

    def __call__(self, images: list[np.ndarray], taught: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The patches of one sample, all with the same colors.

        Args:
            images: (H, W, C) each, uint16 where blends need it.
            taught: Outputs of a teacher, uint16 from -0.5 to 1.5.
        """
        if self._permutes:
            order = random.sample(range(3), 3)
            images, taught = ([patch[:, :, order] for patch in patches] for patches in (images, taught))
        if self._blends and random.random() < self._blends:
            share = random.uniform(self._least_share, 1)
            color = np.array([random.random() for _ in range(self._channels)])
            images = [_blended(patch, share, color) for patch in images]
            taught_color = (color - TAUGHT_LOW) / (TAUGHT_HIGH - TAUGHT_LOW)
            taught = [_blended(patch, share, taught_color) for patch in taught]
        return images, taught


def _blended(patch: np.ndarray, share: float, color: np.ndarray) -> np.ndarray:
    offset = (PEAK * (1 - share) * color + 0.5).astype(np.float32)  # the cast rounds down
    return (patch * np.float32(share) + offset).astype(np.uint16)
