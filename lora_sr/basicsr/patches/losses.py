"""Losses whose options BasicSR documents and does not honor."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from lora_sr.basicsr.patches.tools import is_defective, patch


def patch_perceptual_criterion() -> None:
    """``PerceptualLoss`` with ``criterion: l2`` asks torch for an ``L2loss``, which it never had."""
    from basicsr.losses.basic_loss import PerceptualLoss

    original = PerceptualLoss.__init__
    if not is_defective(original, 'L2loss'):
        return

    @patch
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs)
        squared = given.arguments.get('criterion') == 'l2'
        if squared:
            given.arguments['criterion'] = 'l1'
        original(*given.args, **given.kwargs)
        if squared:
            self.criterion_type, self.criterion = 'l2', torch.nn.MSELoss()

    PerceptualLoss.__init__ = __init__
