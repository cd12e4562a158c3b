"""The model of an option file and its batches, without a run: no folders, no logs, no checkpoints."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models import build_model
from basicsr.utils import logger as basicsr_logger
from basicsr.utils.options import parse_options

from lora_sr.basicsr.patches.options import mistakes


def build_of_options(
    option_file: str | os.PathLike[str], change: Callable[[dict[str, Any]], None] = lambda opt: None
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """The model of an option file for training, and its endless batches, as a run has them.

    Args:
        option_file: The file, whose options have been checked.
        change: Changes the options, as BasicSR has parsed them, before anything is built.
    """
    argv = sys.argv
    sys.argv = [argv[0], '-opt', os.fspath(option_file)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), mistakes('skip'):
            opt, _ = parse_options(os.getcwd(), is_train=True)
    finally:
        sys.argv = argv
    change(opt)
    with _quiet_logger():
        dataset_opt = opt['datasets']['train']
        dataset = build_dataset(dataset_opt)
        sampler = EnlargedSampler(dataset, 1, 0, dataset_opt.get('dataset_enlarge_ratio', 1))
        loader = build_dataloader(dataset, dataset_opt, opt['num_gpu'], sampler=sampler, seed=opt['manual_seed'])
        model = build_model(opt)
    return model, _epochs(loader, sampler)


def _epochs(loader: Any, sampler: Any) -> Iterator[dict[str, Any]]:
    for epoch in count():
        sampler.set_epoch(epoch)
        seen = False
        for batch in loader:
            seen = True
            yield batch
        if not seen:
            return


@contextlib.contextmanager
def _quiet_logger() -> Iterator[None]:
    """Keep BasicSR's logger silent and, where it is new, as if it had not been: a later run gives it its file."""
    logger, is_known = logging.getLogger('basicsr'), 'basicsr' in basicsr_logger.initialized_logger
    handlers, level = list(logger.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if not is_known:
            basicsr_logger.initialized_logger.pop('basicsr', None)
            logger.handlers[:] = handlers
