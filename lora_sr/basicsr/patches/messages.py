"""The lines of the log."""

from __future__ import annotations

import datetime
import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from lora_sr.basicsr.pace import peak_memory
from lora_sr.basicsr.patches.tools import is_defective, patch, replace_everywhere
from lora_sr.basicsr.samples import stream_of

WANDB_ID = 'wandb_id.txt'  # in the folder of a run


def patch_message_logger() -> None:
    """``MessageLogger`` tells neither samples/s nor memory, and times left that are wrong.

    It takes the time since the beginning for that of the iterations: a resumed run has a slow start in it, and one that
    validates seems slow after a validation and quick before. It also counts one iteration too few: in the last one -1
    is left, an ETA of "-1 day, 23:59:55".

    Nothing else is handed the writer of TensorBoard together with the options of its run.
    """
    from basicsr.utils.dist_util import master_only
    from basicsr.utils.logger import MessageLogger

    original = MessageLogger.__init__
    if not is_defective(original, 'max_iters'):
        return

    @patch
    @functools.wraps(original)
    def __init__(self: Any, opt: dict[str, Any], start_iter: int = 1, tb_logger: Any = None) -> None:
        original(self, opt, start_iter, tb_logger)
        self.max_iters += 1
        self.opt = opt
        stream = stream_of(opt)
        if stream is not None:
            stream.tb_logger = tb_logger

    @patch
    @master_only
    @functools.wraps(MessageLogger.__call__)
    def __call__(self: Any, log_vars: dict[str, Any]) -> None:
        stream = stream_of(self.opt)
        if stream is None:
            told(self, log_vars)
        else:
            _tell(self, stream, log_vars)

    told = MessageLogger.__call__
    MessageLogger.__init__ = __init__
    MessageLogger.__call__ = __call__


def _tell(self: Any, stream: Any, log_vars: dict[str, Any]) -> None:
    """Log a line of a run of which more is known, in the form that BasicSR's readers of logs expect."""
    opt = self.opt
    epoch, iteration, rates = log_vars.pop('epoch'), log_vars.pop('iter'), log_vars.pop('lrs')
    averaged, data_seconds = log_vars.pop('time'), log_vars.pop('data_time')
    losses = {name: float(value) for name, value in log_vars.items()}

    seconds = stream.pace.lately(iteration) or averaged
    frequencies = {
        'saving': opt['logger']['save_checkpoint_freq'],
        'validation': (opt.get('val') or {}).get('val_freq'),
    }
    known = {what: int(frequency) for what, frequency in frequencies.items() if frequency}
    left = datetime.timedelta(seconds=int(stream.pace.left(iteration, averaged, known)))
    speed = stream.batch_size * stream.processes / seconds
    memory = peak_memory(torch.device('cuda' if opt['num_gpu'] != 0 else 'cpu'))

    name = opt['name'][:5]
    place = f'[{name}..][epoch:{epoch:3d}, iter:{iteration:8,d}, lr:({"".join(f"{rate:.3e}," for rate in rates)})]'
    peak = '' if memory is None else f', memory: {memory / 2**20:,.0f} MiB'
    timing = f'[eta: {left}, time (data): {averaged:.3f} ({data_seconds:.3f}), samples/s: {speed:,.1f}{peak}]'
    self.logger.info(' '.join([place, timing, *(f'{key}: {value:.4e}' for key, value in losses.items()), '']))
    if stream.tb_logger is not None:
        scalars = {f'losses/{key}' if key.startswith('l_') else key: value for key, value in losses.items()}
        for key, value in {**scalars, 'samples_per_second': speed}.items():
            stream.tb_logger.add_scalar(key, value, iteration)
    if stream.metrics is not None:
        values = {'iter': iteration, 'epoch': epoch, 'lr': list(rates), 'losses': losses}
        values.update(seconds=seconds, data_seconds=data_seconds, samples_per_second=speed)
        stream.metrics.add({**values, 'memory': memory})


def patch_init_wandb_logger() -> None:
    """``init_wandb_logger`` begins a run of its own at wandb for each resume, unless its id is copied by hand.

    It makes the id by a function that newer versions of wandb do not have.
    """
    from basicsr.utils import get_root_logger
    from basicsr.utils import logger as module
    from basicsr.utils.dist_util import master_only

    original = module.init_wandb_logger
    if not is_defective(original, 'generate_id'):
        return

    @patch
    @master_only
    @functools.wraps(original)
    def init_wandb_logger(opt: dict[str, Any]) -> None:
        wandb = importlib.import_module('wandb')
        options, file = opt['logger']['wandb'], Path(opt['path']['experiments_root']) / WANDB_ID
        known = options.get('resume_id')
        if known is None and opt['path'].get('resume_state') and file.is_file():
            known = file.read_text().strip()
        run = wandb.init(
            id=known,
            resume=None if known is None else 'allow',
            name=opt['name'],
            config=opt,
            project=options['project'],
            sync_tensorboard=True,
        )
        file.write_text(f'{run.id}\n')
        get_root_logger().info(f'Use wandb logger with id={run.id}; project={options["project"]}.')

    replace_everywhere(original, init_wandb_logger)
