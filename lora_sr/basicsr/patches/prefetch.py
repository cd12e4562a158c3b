"""Batches that are read ahead of training."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import DataLoader

from lora_sr.basicsr.patches.tools import is_defective, patch


def patch_prefetch_thread() -> None:
    """``PrefetchGenerator`` loses an error of its thread, and whoever waits for the next batch waits forever.

    So does whoever asks again after the last one. Without workers, moreover, its thread draws crops and flips from the
    random state that the training draws from; there the batches are read where they are awaited.
    """
    from basicsr.data.prefetch_dataloader import PrefetchDataLoader, PrefetchGenerator

    if not is_defective(PrefetchGenerator.run, 'put', without='BaseException'):
        return
    begin = PrefetchDataLoader.__iter__

    @patch
    def __iter__(self: Any) -> Any:
        return begin(self) if self.num_workers else DataLoader.__iter__(self)

    @patch
    def run(self: Any) -> None:
        try:
            for item in self.generator:
                self.queue.put(item)
        except BaseException as error:  # raised where the batch is awaited
            self.error = error
        self.queue.put(None)

    @patch
    def __next__(self: Any) -> Any:
        item = self.queue.get()
        if item is not None:
            return item
        self.queue.put(None)  # the thread has ended: whoever asks again gets the same answer
        raise self.error or StopIteration

    PrefetchDataLoader.__iter__ = __iter__
    PrefetchGenerator.error = None
    PrefetchGenerator.run = run
    PrefetchGenerator.__next__ = __next__


def patch_prefetchers() -> None:
    """``CPUPrefetcher`` and ``CUDAPrefetcher`` read when they are made, and again when ``train_pipeline`` resets them.

    Two sets of workers are then started, or two threads read one dataset at once, which opens its files at the first
    sample: the slower thread fails on what the other one has taken. Here the first ``reset`` or ``next`` begins.
    """
    from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher

    @patch
    def init_cpu(self: Any, loader: Any) -> None:
        self.ori_loader = loader
        self.loader = None

    @patch
    def init_cuda(self: Any, loader: Any, opt: dict[str, Any]) -> None:
        init_cpu(self, loader)
        self.opt = opt
        self.stream = torch.cuda.Stream()
        self.device = torch.device('cuda' if opt['num_gpu'] != 0 else 'cpu')

    for prefetcher, init in ((CPUPrefetcher, init_cpu), (CUDAPrefetcher, init_cuda)):
        if is_defective(prefetcher.__init__, 'iter'):
            prefetcher.__init__ = init
            prefetcher.next = _begin_at_next(prefetcher.next)


def _begin_at_next(original: Any) -> Any:
    @patch
    @functools.wraps(original)
    def next(self: Any) -> Any:
        if self.loader is None:
            self.reset()
        return original(self)

    return next
