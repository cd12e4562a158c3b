"""Going on with a run, on any machine."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_sr.basicsr import launcher, resume
from lora_sr.basicsr.patches.tools import is_defective, patch, replace_everywhere
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import InputError


def patch_training_state_types() -> None:
    """A training state has a ``Counter``, which older versions of torch refuse with ``weights_only=True``."""
    probe = io.BytesIO()
    torch.save(Counter(), probe)
    probe.seek(0)
    try:
        torch.load(probe, weights_only=True)
    except Exception:  # the type of the refusal differs between versions of torch
        if hasattr(torch.serialization, 'add_safe_globals'):
            torch.serialization.add_safe_globals([Counter])
        else:  # before torch 2.4 the table of allowed types had no public door
            torch._weights_only_unpickler._get_allowed_globals()['collections.Counter'] = Counter


def patch_check_resume() -> None:
    """``check_resume`` points every network to a file of the run, a frozen teacher as well, which is never saved.

    It also leaves a ``param_key_*`` that suits the pretrained file but not the run's own, which has ``params``.
    """
    from basicsr.utils import misc

    original = misc.check_resume
    if not is_defective(original, 'param_keys'):
        return

    @patch
    @functools.wraps(original)
    def check_resume(opt: dict[str, Any], resume_iter: int) -> None:
        paths = opt['path']
        before = dict(paths)
        original(opt, resume_iter)
        for network in [key[len('network_') :] for key in opt if key.startswith('network_')]:
            key = f'pretrain_network_{network}'
            saved = paths.get(key)
            if saved is None or saved == before.get(key):
                continue
            if Path(saved).is_file():
                paths[f'param_key_{network}'] = 'params'
                continue
            was_saved = any(Path(saved).parent.glob(f'net_{network}_*.pth'))
            if network == 'g' or was_saved or before.get(key) is None:
                raise InputError(f'the run cannot be resumed at iteration {resume_iter}: {saved} is missing.')
            for kept in (key, f'param_key_{network}'):
                if kept in before:
                    paths[kept] = before[kept]

    replace_everywhere(original, check_resume)


def patch_load_resume_state() -> None:
    """``load_resume_state`` puts the training state on a GPU that may not be there, and takes any file for a state.

    It is defined by the script that trains, hence looked for in every module.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        original = names.get('load_resume_state')
        if inspect.isfunction(original) and is_defective(original, 'current_device'):
            names['load_resume_state'] = load_resume_state


def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """The training state to go on from, or None; ``opt['path']`` is set up for it.

    With ``--auto_resume`` it is the state of the run with the highest iteration, else ``path.resume_state``.

    Raises:
        InputError: The state, or a network saved with it, is missing or damaged, or is of other options.
    """
    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        folder = opt['path']['training_states']
        iteration = launcher.of_first(resume.last_saved(folder))
        path = None if iteration is None else os.path.join(folder, f'{iteration}.state')
        if path is not None:
            opt['path']['resume_state'] = path
    if not path:
        return None
    from basicsr.utils import misc

    with _with_the_one_before(opt, path):
        state = read_checkpoint(path)
        missing = [key for key in ('epoch', 'iter', 'optimizers', 'schedulers') if key not in state]
        if missing:
            raise InputError(f'{path} is not a training state: it has no {", ".join(missing)}.')
        resume.check_state(state, path)
    folder = opt['path']['training_states']
    if os.path.realpath(os.path.dirname(path)) != os.path.realpath(folder):
        raise InputError(
            f'path.resume_state must be a state of this run, in {folder}, got {path}: go on under the name of that '
            'run, or begin from its weights by path.pretrain_network_g.'
        )
    resume.check_options(opt, state)
    with _with_the_one_before(opt, path):
        misc.check_resume(opt, state['iter'])
    return state


@contextlib.contextmanager
def _with_the_one_before(opt: dict[str, Any], path: str) -> Iterator[None]:
    """Say of a state that cannot be used from which one the run goes on without it."""
    try:
        yield
    except InputError as error:
        older = (
            resume.last_saved(opt['path']['training_states'], before=Path(path).stem) if opt['auto_resume'] else None
        )
        if older is None:
            raise
        raise InputError(
            f'{str(error).rstrip(".")}. Without {path} the run goes on from iteration {older:,}.'
        ) from error


def patch_resume_training() -> None:
    """``BaseModel.resume_training`` loads the learning rates of the state over those of the option file.

    It also takes the state of any optimizer, whose step then fails on what is not its own, and forgets the metrics.
    """
    from basicsr.models.base_model import BaseModel

    original = BaseModel.resume_training
    if not is_defective(original, 'load_state_dict', without='betas'):
        return

    @patch
    @functools.wraps(original)
    def resume_training(self: Any, resume_state: dict[str, Any]) -> None:
        resume.resume(self, resume_state, functools.partial(original, self, resume_state))

    BaseModel.resume_training = resume_training
