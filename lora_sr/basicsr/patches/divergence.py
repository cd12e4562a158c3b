"""A training that has diverged ends, and overwrites nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_sr.basicsr.patches.tools import is_defective, patch
from lora_sr.basicsr.resume import last_saved, moments_of
from lora_sr.errors import DivergenceError


def patch_reduce_loss_dict() -> None:
    """``reduce_loss_dict`` hands on a loss of NaN or infinity, and the run goes on for days, and saves what it makes.

    Every model logs its losses by it, in every iteration, and waits for a GPU there. On one they are read when they are
    logged, in ``get_current_log``.
    """
    from basicsr.models.base_model import BaseModel

    original, get_current_log = BaseModel.reduce_loss_dict, BaseModel.get_current_log
    if not is_defective(original, 'item', without='isfinite'):
        return

    def read(self: Any, losses: Mapping[str, Tensor]) -> dict[str, float]:
        log = original(self, losses)
        for name, value in log.items():
            if not math.isfinite(value):
                raise DivergenceError(_sentence(self, f'the loss {name} is {value}'))
        return log

    @patch
    @functools.wraps(original)
    def reduce_loss_dict(self: Any, loss_dict: dict[str, Tensor]) -> Mapping[str, Any]:
        if self.device.type == 'cpu':  # nothing is waited for
            return read(self, loss_dict)
        return {name: value.detach().mean() for name, value in loss_dict.items()}

    @patch
    @functools.wraps(get_current_log)
    def get_logged(self: Any) -> Mapping[str, Any]:
        log = get_current_log(self)
        if any(isinstance(value, Tensor) for value in log.values()):
            log = self.log_dict = read(self, log)
        return log

    BaseModel.reduce_loss_dict = reduce_loss_dict
    BaseModel.get_current_log = get_logged


def check_weights(model: Any, label: str, networks: Iterable[nn.Module]) -> None:
    """Refuse to save networks whose parameters are not finite: a step may break them after a loss that was.

    Raises:
        DivergenceError: Of the first such parameter.
    """
    for network in networks:
        for name, value in model.get_bare_model(network).named_parameters():
            if not torch.isfinite(value).all():
                raise DivergenceError(_sentence(model, f'{name} of {label} is no longer finite'))


def check_optimizers(model: Any) -> None:
    """Refuse to save the states of optimizers that are not finite: what they train stands still, or will break.

    Raises:
        DivergenceError: Of the first such state.
    """
    for optimizer in model.optimizers:
        for _, name, value in moments_of(optimizer):
            if not torch.isfinite(value).all():
                raise DivergenceError(_sentence(model, f'{name} of {type(optimizer).__name__} is no longer finite'))


def _sentence(model: Any, reason: str) -> str:
    iteration = getattr(model, 'current_iter', None)
    where = '' if iteration is None else f' at iteration {iteration:,}'
    folder = model.opt.get('path', {}).get('training_states')
    saved = None if folder is None else last_saved(folder)
    last = (
        'No checkpoint had been saved: lower the learning rate, and look at the data.'
        if saved is None
        else f'The last checkpoint is of iteration {saved:,}: lower the learning rate, and go on with --auto_resume.'
    )
    return f'the training was stopped{where}: {reason}. {last}'
