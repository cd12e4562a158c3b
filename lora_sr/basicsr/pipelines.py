"""BasicSR's own pipelines, in which the patches check the option file."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from basicsr.test import test_pipeline
from basicsr.train import train_pipeline

from lora_sr.basicsr import progress, provenance, run_folder, signals
from lora_sr.basicsr.patches.options import mistakes, tell
from lora_sr.basicsr.resume import last_saved
from lora_sr.checkpoints.content import forget
from lora_sr.errors import DivergenceError, InputError


def run(is_train: bool, argv: list[str]) -> int:
    """Run BasicSR's pipeline in the current folder, which begins with the check of the option file.

    Returns the exit status: 0, also of a training that a signal or its time has ended, see
    :mod:`lora_sr.basicsr.signals`; 2 after mistakes in the input and 1 after a training that diverged, each told in a
    line on the standard error by the first process of each machine; or 130 after Ctrl-C that did not wait.
    """
    try:
        run_pipeline(is_train, argv)
    except InputError as error:
        tell(error)
        return 2
    except DivergenceError as error:
        tell(error)
        return 1
    except KeyboardInterrupt:
        folder = os.path.join(os.getcwd(), 'experiments', str(provenance.given('name')), 'training_states')
        iteration = last_saved(folder) if is_train else None
        hint = '' if iteration is None else f'; --auto_resume goes on from iteration {iteration:,}'
        print(f'interrupted{hint}', file=sys.stderr, flush=True)
        return 130
    finally:
        signals.ignore()
    return 0


def run_pipeline(is_train: bool, argv: list[str]) -> None:
    """Run BasicSR's `train_pipeline` or `test_pipeline` with that command line.

    Raises:
        InputError: something is wrong with the input; before the run starts, all that is wrong, a sentence a line.
    """
    before = sys.argv
    sys.argv = [before[0], *argv]  # BasicSR reads it, and copies it into the experiment's option file
    try:
        with mistakes('raise'):
            (train_pipeline if is_train else test_pipeline)(os.getcwd())
    finally:
        sys.argv = before
        forget()
        progress.close()
        run_folder.release()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
