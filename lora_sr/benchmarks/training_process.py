"""Training in a process of its own, whose memory is nobody else's, and where stock BasicSR is without our patches."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_sr import hook
from lora_sr.report.memory import forget_peak, peak

PEFT = 'PeftLoRA'  # what a network with PEFT's LoRA is called in an option file here
READY = 'ready'  # what a process says that can start
WAITING = 2  # batches that each worker of a loader has ready


@dataclass(frozen=True)
class Task:
    """What a process trains.

    Args:
        opt: Options, as ``parse_options`` hands them to a model.
        batches: A file of batches, each ``{'lq', 'gt'}``, that come in turn.
        steps: How many are done before any is timed, for the loss.
        is_stock: Whether BasicSR is left as its authors wrote it.
        loader: The section ``datasets.train`` of what :meth:`Trainer.loop` reads; None for no loader.
        is_taught: Whether what ``network_t`` makes of the batches is computed beforehand.
        start_method: How processes are started on this system, as the workers of a loader are.
    """

    opt: Mapping[str, Any]
    batches: Path
    steps: int
    is_stock: bool = False
    loader: Mapping[str, Any] | None = None
    is_taught: bool = False
    start_method: str = field(default_factory=multiprocessing.get_start_method)


@dataclass(frozen=True)
class Started:
    """What a process says of its first steps.

    Args:
        loss: Of the last.
        warnings: What the log said of the keys of ``train``.
        held: Bytes of a GPU at their peak.
    """

    loss: float
    warnings: tuple[str, ...]
    held: int = 0


def serve(connection: Connection, task: Task) -> None:
    """Say READY, answer a message with a :class:`Started`, and then each ``(method, seconds)`` with what it gave.

    An error is answered in its place, as a sentence.
    """
    multiprocessing.set_start_method(task.start_method, force=True)
    status = 1
    try:
        trainer = Trainer(task)
        connection.send(READY)
        connection.recv()
        connection.send(trainer.start())
        while True:
            method, seconds = connection.recv()
            connection.send(getattr(trainer, method)(seconds))
    except EOFError:
        status = 0
    except Exception as error:  # whatever it is, the other forms are measured
        connection.send(f'{type(error).__name__}: {error}'.partition('\n')[0])
    finally:
        # To wait for workers that have batches ready takes seconds, and there is nothing to keep.
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stderr.flush()
        os._exit(status)


class Trainer:
    """A model that does its first steps when it is started, and then more to be timed.

    Args:
        task: What it trains.
    """

    def __init__(self, task: Task):
        self.task, self.opt = task, deepcopy(dict(task.opt))
        if task.is_stock:
            _leave_basicsr_alone()
        from basicsr.utils import get_root_logger

        warnings.simplefilter('ignore')  # what torch finds in BasicSR's networks
        self._told = _Told()
        get_root_logger(log_level=logging.WARNING).handlers[:] = [self._told]
        if task.is_stock:
            _add_ours()
        self.on_gpu = bool(self.opt['num_gpu'])
        self.device = torch.device('cuda' if self.on_gpu else 'cpu')

    def start(self) -> Started:
        """Build the model and do the first steps."""
        from basicsr.data import build_dataset
        from basicsr.models import build_model

        task = self.task
        torch.backends.cudnn.benchmark = True  # as BasicSR's train.py has it
        # A loader's work is measured by itself.
        self.batches = torch.load(task.batches, weights_only=True, map_location=self.device)
        if task.is_taught:
            _teach(self.batches, self.opt)
        # A teacher of whole images leaves memory behind that steps then take.
        tells_memory = sys.platform == 'linux' and not self.on_gpu and not task.is_taught
        before = forget_peak() if tells_memory else 0
        torch.manual_seed(0)
        self.model = build_model(self.opt)
        self.dataset = build_dataset(deepcopy(dict(task.loader))) if task.loader else None
        if task.is_taught and self.dataset is not None:
            self.model.teach(self.dataset)
        self.iteration = 0
        self._loading: Iterator[Any] | None = None
        for _ in range(task.steps):
            self._step()
        loss = next(iter(self.model.get_current_log().values()))
        self._peak = peak() - before if tells_memory else 0
        held = torch.cuda.max_memory_reserved() if self.on_gpu else 0
        self._leave_memory()
        return Started(loss, tuple(self._told.messages), held)

    def memory(self, seconds: float) -> int:
        """Bytes at the peak: on a GPU what is held for steps, else by how much they raised the resident memory.

        0 where the system does not tell, or a teacher has worked before. What a GPU's library holds while it chooses
        its kernels is not counted.
        """
        if not self.on_gpu:
            return self._peak
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step(seconds)
        return torch.cuda.max_memory_reserved()  # what a recorded step works in counts as allocated no longer

    def step(self, seconds: float) -> float:
        """Seconds of a step on batches in memory, as a mean over some time."""
        if self.on_gpu:
            self._step()  # takes the memory that other processes have had meanwhile
        return self._mean(self._step, seconds)

    def loop(self, seconds: float) -> float:
        """Seconds of an iteration whose batch comes from the loader, with workers that are as busy as in a long run."""
        prefetcher = self._prefetcher()

        def iterate() -> None:
            self._train(prefetcher.next())

        self._take_ready(prefetcher)
        iterate()
        return self._mean(iterate, seconds)

    def load(self, seconds: float) -> float:
        """Seconds of a batch of the loader alone, as floating point on the device."""
        from lora_sr.basicsr.integer_images import with_floats

        prefetcher = self._prefetcher()

        def load() -> None:
            for value in with_floats(prefetcher.next(), self.device).values():
                if isinstance(value, Tensor):
                    value.to(self.device)

        self._take_ready(prefetcher)
        return self._mean(load, seconds)

    def _mean(self, run: Any, seconds: float) -> float:
        self._wait()
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < seconds:
            run()
            count += 1
        self.model.get_current_log()
        self._wait()
        taken = time.perf_counter() - start
        self._leave_memory()
        return taken / count

    def _leave_memory(self) -> None:
        """Give what no tensor holds to the other processes."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _step(self) -> None:
        torch.manual_seed(self.iteration)
        self._train(self.batches[self.iteration % len(self.batches)])

    def _train(self, batch: Mapping[str, Any]) -> None:
        """An iteration, as in BasicSR's train.py."""
        self.iteration += 1
        self.model.update_learning_rate(self.iteration, warmup_iter=-1)
        self.model.feed_data(batch)
        self.model.optimize_parameters(self.iteration)

    def _take_ready(self, prefetcher: Any) -> None:
        """Take the batches that have been waiting for us, which cost nothing."""
        for _ in range(WAITING * self.task.loader['num_worker_per_gpu'] + 1 if self.task.loader else 0):
            prefetcher.next()

    def _prefetcher(self) -> Any:
        from basicsr.data import build_dataloader
        from basicsr.data.data_sampler import EnlargedSampler
        from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher

        if self._loading is None:
            opt = deepcopy(dict(self.task.loader or {}))
            dataset: Any = self.dataset
            sampler = EnlargedSampler(dataset, 1, 0, 1 + 2_000_000 // len(dataset))  # one epoch, which does not end
            num_gpu = self.task.opt['num_gpu']
            loader = build_dataloader(dataset, opt, num_gpu, sampler=sampler, seed=0)
            prefetches = opt.get('prefetch_mode') == 'cuda'
            self._loading = CUDAPrefetcher(loader, self.task.opt) if prefetches else CPUPrefetcher(loader)
        return self._loading


class _Told(logging.Handler):
    """Keeps what a log says of the keys of ``train``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith('train.'):
            self.messages.append(message)


def _leave_basicsr_alone() -> None:
    """Take our hook out before BasicSR is imported; but for what torchvision has moved it could not be."""
    assert 'basicsr' not in sys.modules
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != hook.__name__]
    hook.patch_torchvision_import()


def _add_ours() -> None:
    """Register networks and a model of ours in BasicSR, as files in its folders would be; branches are as published."""
    from basicsr.utils import registry

    from lora_sr.archs.registry import OWN
    from lora_sr.archs.reparam import Foldable
    from lora_sr.basicsr.models import DistillationModel
    from lora_sr.checkpoints.building import DESCRIBED

    for network in (*OWN.values(), *DESCRIBED.values()):
        registry.ARCH_REGISTRY.register(network)
    registry.ARCH_REGISTRY._do_register(PEFT, with_peft)
    registry.MODEL_REGISTRY.register(DistillationModel)
    Foldable.trains_folded = False


def with_peft(base: dict[str, Any], lora: dict[str, Any]) -> nn.Module:
    """The network that ``AdaptSR`` makes of the same arguments, but with PEFT's LoRA, on the same layers."""
    from peft import LoraConfig, inject_adapter_in_model

    from lora_sr.adapters import lora_layers
    from lora_sr.archs.adaptsr import AdaptSR
    from lora_sr.archs.registry import find_arch

    layers = [name for name, _ in lora_layers(AdaptSR(base, lora))]
    arch: Any = find_arch(base['type'])
    network = arch(**{key: value for key, value in base.items() if key != 'type'})
    return inject_adapter_in_model(LoraConfig(r=lora['rank'], lora_alpha=lora['alpha'], target_modules=layers), network)


@torch.no_grad()
def _teach(batches: list[dict[str, Any]], opt: dict[str, Any]) -> None:
    """Give batches what the teacher makes of them, as a dataset does, and let the model count on that."""
    from basicsr.archs import build_network

    from lora_sr.archs import fold

    teacher = build_network(dict(opt['network_t']))
    teacher.load_state_dict(torch.load(opt['path']['pretrain_network_t'], weights_only=True))
    teacher = fold(teacher).eval().to(batches[0]['lq'].device)
    for batch in batches:
        batch['taught'] = teacher(batch['lq']).clone()
    opt['network_t'] = {**opt['network_t'], 'precompute': True}
