"""Validation during a run: once, also after a resume, to be stopped, and with the better value as the best."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from lora_sr.basicsr import signals
from lora_sr.basicsr.metrics import lower_is_better
from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch
from lora_sr.basicsr.samples import SampleStream, stream_of


def patch_validation() -> None:
    """``train_pipeline`` validates once more at its end, also where the last iteration has just been validated.

    A signal waits until all images are done, which may be longer than a scheduler does.
    """
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
        stream = stream_of(self.opt) if self.is_train else None
        images = dataloader if stream is None else _Watched(dataloader, self, stream, current_iter)
        original(self, images, current_iter, tb_logger, save_img)
        done[id(dataloader)] = current_iter

    BaseModel.validation = validation


class _Watched:
    """A data loader before each image of which a signal ends the run, as it does between two iterations."""

    def __init__(self, loader: Any, model: Any, stream: SampleStream, iteration: int):
        self.loader = loader
        self.place = model, stream.sampler.epoch, iteration, stream.start.iteration

    def __iter__(self) -> Iterator[Any]:
        for images in self.loader:
            signals.stop_if_told(*self.place)
            yield images

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def validate_again(model: Any, stream: SampleStream) -> None:
    """Validate a run that goes on where it was saved, if that is where it validates: this comes after saving.

    Whether it did so before it ended nobody knows; its training state knows no best value of it.

    Args:
        model: The model of the run, before its first iteration.
        stream: The samples of the run, which know where it goes on and on what it validates.
    """
    options, iteration = model.opt.get('val'), stream.start.iteration
    if options is not None and iteration % options['val_freq'] == 0:
        for loader in stream.val_loaders:
            model.validation(loader, iteration, stream.tb_logger, options['save_img'])


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
