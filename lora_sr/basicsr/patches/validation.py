"""Validation during a run: once, and with the better value as the best."""

from __future__ import annotations

import functools
from typing import Any

from lora_sr.basicsr.metrics import lower_is_better
from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch


def patch_validation() -> None:
    """``train_pipeline`` validates once more at its end, also where the last iteration has just been validated."""
    from basicsr.models.base_model import BaseModel

    original = BaseModel.validation
    if is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def validation(self: Any, dataloader: Any, current_iter: int, tb_logger: Any, save_img: bool = False) -> None:
        done = self.__dict__.setdefault('validated', {})
        if self.is_train and done.get(id(dataloader)) == current_iter:
            return
        original(self, dataloader, current_iter, tb_logger, save_img)
        done[id(dataloader)] = current_iter

    BaseModel.validation = validation


def patch_best_metrics() -> None:
    """``_initialize_best_metric_results`` takes the highest NIQE for the best, and a resumed run knows no best."""
    from basicsr.models.base_model import BaseModel

    original = BaseModel._initialize_best_metric_results
    if not is_defective(original, 'better', without='lower_is_better'):
        return

    @patch
    @functools.wraps(original)
    def _initialize_best_metric_results(self: Any, dataset_name: str) -> None:
        known = dataset_name in getattr(self, 'best_metric_results', {})
        original(self, dataset_name)
        if known:
            return
        resumed = getattr(self, 'resumed_best', {}).get(dataset_name, {})
        for name, best in self.best_metric_results[dataset_name].items():
            section = self.opt['val']['metrics'][name]
            if 'better' not in section and lower_is_better(section['type']):
                best.update(better='lower', val=float('inf'))
            if resumed.get(name, {}).get('better') == best['better']:
                best.update(resumed[name])

    BaseModel._initialize_best_metric_results = _initialize_best_metric_results
