"""Validation during a run: once, also after a resume, to be stopped, kept, and with the better value as the best."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_sr.basicsr import signals
from lora_sr.basicsr.kept import keep_best
from lora_sr.basicsr.metrics import lower_is_better
from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch
from lora_sr.basicsr.records import record
from lora_sr.basicsr.samples import SampleStream, stream_of
from lora_sr.basicsr.tested import overridden, tested


def patch_validation() -> None:
    """``train_pipeline`` validates once more at its end, also where the last iteration has just been validated.

    A signal waits until all images are done, which may be longer than a scheduler does. Large images take more memory
    than training does. The results are only logged, and the best network is not kept.
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
        with contextlib.ExitStack() as stack:
            stack.enter_context(tested(self, current_iter))
            images = dataloader
            if stream is not None:
                images = _Watched(dataloader, self, stream, current_iter)
                stack.enter_context(stream.pace.apart('validation', current_iter))
                stack.enter_context(_told(self, images, tb_logger))
            original(self, images, current_iter, tb_logger, save_img)
        done[id(dataloader)] = current_iter

    BaseModel.validation = validation


@contextlib.contextmanager
def _told(model: Any, images: _Watched, tb_logger: Any) -> Iterator[None]:
    """Keep the results of a validation, the best network, and in TensorBoard the images if they are wanted."""
    iteration = images.place[2]
    results: dict[str, dict[str, float]] = {}
    update, visuals = model._update_best_metric_result, model.get_current_visuals

    def _update_best_metric_result(dataset: str, metric: str, value: float, current_iter: int) -> None:
        results.setdefault(dataset, {})[metric] = float(value)
        update(dataset, metric, value, current_iter)

    def get_current_visuals() -> Any:
        shown = visuals()
        image = shown['result'][0].float().clamp(0, 1)  # RGB, (C, H, W)
        tb_logger.add_image(images.name_of_current(), image, iteration)
        return shown

    names: dict[str, Any] = {'_update_best_metric_result': _update_best_metric_result}
    if tb_logger and model.opt['logger'].get('save_images_to_tb'):
        names['get_current_visuals'] = get_current_visuals
    with overridden(model, **names):
        yield
    for dataset, metrics in results.items():
        record(model.opt, iter=iteration, validation=dataset, metrics=metrics)
        keep_best(model, dataset, iteration)


class _Watched:
    """A data loader before each image of which a signal ends the run, as it does between two iterations."""

    def __init__(self, loader: Any, model: Any, stream: SampleStream, iteration: int):
        self.loader = loader
        self.current: Any = None
        self.place = model, stream.sampler.epoch, iteration, stream.start.iteration

    def __iter__(self) -> Iterator[Any]:
        for images in self.loader:
            signals.stop_or_save_if_told(*self.place)
            self.current = images
            yield images

    def name_of_current(self) -> str:
        """The set and the image, as TensorBoard sorts them."""
        return f'{self.loader.dataset.opt["name"]}/{Path(self.current["lq_path"][0]).stem}'

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
