"""What a run draws and with which rate it learns: samples, random numbers and learning rates, also after a resume."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lora_sr.basicsr import progress, provenance, records, signals
from lora_sr.basicsr.patches.tools import is_patch, patch, replace_everywhere
from lora_sr.basicsr.patches.validation import validate_again
from lora_sr.basicsr.samples import NamedDataset, SampleStream, SeededDataset, seed_process, stream_of
from lora_sr.basicsr.step.settings import batches_per_step
from lora_sr.checkpoints.content import read_checkpoint


def patch_build_dataloader() -> None:
    """``build_dataloader`` seeds workers, not samples: what a worker has drawn is lost when a run ends.

    Its worker seeds are also the same in each epoch, hence the crops.
    """
    from basicsr import data

    original = data.build_dataloader
    if is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def build_dataloader(
        dataset: Any,
        dataset_opt: dict[str, Any],
        num_gpu: int = 1,
        dist: bool = False,
        sampler: Any = None,
        seed: int | None = None,
    ) -> DataLoader:
        is_map = not isinstance(dataset, IterableDataset)
        if dataset_opt['phase'] == 'train' and sampler is not None and seed is not None and is_map:
            dataset, sampler = SeededDataset(dataset), SampleStream(sampler, seed)
        elif dataset_opt['phase'] != 'train' and is_map:
            dataset = NamedDataset(dataset)
        loader = original(dataset, dataset_opt, num_gpu, dist, sampler, seed)
        if dataset_opt['phase'] == 'train' and loader.num_workers:
            loader.worker_init_fn = functools.partial(_begin_worker, loader.worker_init_fn)
        return loader

    replace_everywhere(original, build_dataloader)


def _begin_worker(original: Any, worker_id: int) -> None:
    signals.shield_worker()
    if original is not None:
        original(worker_id)


def patch_create_train_val_dataloader() -> None:
    """``create_train_val_dataloader`` knows nothing of a run that goes on, and counts epochs of whole batches wrong.

    A batch that is left over counts as an iteration, though the loader drops it: many short epochs end too early. It is
    defined by the script that trains, hence looked for in every module.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        original = names.get('create_train_val_dataloader')
        if inspect.isfunction(original) and not is_patch(original):
            names['create_train_val_dataloader'] = _begun(original)


def _begun(original: Any) -> Any:
    @patch
    @functools.wraps(original)
    def create_train_val_dataloader(opt: dict[str, Any], logger: Any) -> Any:
        made = original(_with_batches_of_a_step(opt), logger)
        stream = getattr(made[0], 'sampler', None)
        if not isinstance(stream, SampleStream):
            return made
        signals.listen((opt.get('train') or {}).get('max_minutes'))
        path = opt['path'].get('resume_state')
        state = read_checkpoint(path) if path else {}
        last_epoch = stream.begin(opt, made[0].batch_size, state, provenance.given('manual_seed'))
        loader, sampler, val_loaders, _, iterations = made
        stream.val_loaders, stream.dataset = val_loaders, loader.dataset
        records.begin(opt)
        return loader, sampler, val_loaders, last_epoch, iterations

    return create_train_val_dataloader


def _with_batches_of_a_step(opt: dict[str, Any]) -> dict[str, Any]:
    """The options of a run whose loader gives the batches of a whole step at once, as ``accumulate_iter`` has it."""
    count = batches_per_step(opt.get('train'))
    if count == 1:
        return opt
    train = opt['datasets']['train']
    train = {**train, 'batch_size_per_gpu': train['batch_size_per_gpu'] * count}
    return {**opt, 'datasets': {**opt['datasets'], 'train': train}}


def patch_update_learning_rate() -> None:
    """A training step draws from a stream of random numbers that no training state holds; a warm-up ends too low.

    ``update_learning_rate`` is what BasicSR calls first in an iteration; here it also seeds that iteration, or ends the
    run before it if a signal has come. A run that goes on first makes up for a validation. A scheduler of steps goes on
    from the rate it finds, which in a warm-up is not its own: it stayed a step below for good.
    """
    from basicsr.models.base_model import BaseModel

    original = BaseModel.update_learning_rate
    if is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def update_learning_rate(self: Any, current_iter: int, warmup_iter: int = -1) -> None:
        stream = stream_of(self.opt)
        if stream is not None:
            done = current_iter - 1
            stream.pace.begin(done)
            progress.show(self.opt, stream, done)
            if done == stream.start.iteration > 0:
                validate_again(self, stream)
            signals.stop_if_told(self, stream.sampler.epoch, done, stream.start.iteration)
            seed_process(stream.seed, stream.rank, current_iter)
        self.current_iter = current_iter
        if 1 < current_iter <= warmup_iter:
            _leave_warm_up(self.schedulers)
        original(self, current_iter, warmup_iter)

    BaseModel.update_learning_rate = update_learning_rate


def _leave_warm_up(schedulers: list[Any]) -> None:
    """Give the optimizers the rates of their schedulers, for these to go on from."""
    for scheduler in schedulers:
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr()):
            group['lr'] = rate
