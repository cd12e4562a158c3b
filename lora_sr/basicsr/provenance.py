"""Where the files of a run come from: its effective options, their hash, and the command that repeats it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from lora_sr.adapters import is_lora_key
from lora_sr.checkpoints.imports import find_file
from lora_sr.checkpoints.layouts import layout_of
from lora_sr.checkpoints.origin import Origin, fingerprint
from lora_sr.option_file import OptionDumper

DEFAULTS = (('--launcher', 'none'), ('--local_rank', '0'))  # arguments that need not be repeated
_effective: dict[str, Any] = {}
_overrides: list[str] = []
_text = ''


def begin(file: str, options: Mapping[str, Any], overrides: list[str] | None) -> None:
    """Take down the run that begins: the text of its option file, and the options with ``--force_yml`` applied."""
    global _effective, _overrides, _text
    _effective, _overrides = _plain(options), list(overrides or ())
    _text = Path(file).read_text(encoding='utf-8')


def options_hash() -> str | None:
    """SHA-256 of the effective options; ``None`` outside of a run."""
    return hashlib.sha256(json.dumps(_effective, sort_keys=True).encode()).hexdigest() if _effective else None


def given(path: str) -> Any:
    """An option, ``a.b.c``, as the user gave it, with ``--force_yml`` applied; ``None`` where it was not given."""
    value: Any = _effective
    for key in path.split('.'):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def origin(model: Any, label: str, iteration: int, state: Mapping[str, Tensor]) -> Origin:
    """Where a network that a run saves comes from.

    Args:
        model: The model of the run; its base's fingerprint is kept there, as a base does not change.
        label: ``net_g`` and the like.
        iteration: Of the run; -1 for its end.
        state: The state dict.
    """
    if not hasattr(model, 'base_fingerprint') and any(map(is_lora_key, state)):
        model.base_fingerprint = fingerprint(state)
    section, network = f'network_{label[len("net_") :]}', getattr(model, label, None)
    return Origin(
        run=model.opt.get('name'),
        iteration=None if iteration == -1 else iteration,
        options=options_hash(),
        network=_effective.get(section),
        base=getattr(model, 'base_fingerprint', None) if label == 'net_g' else None,
        layout=layout_of(model.get_bare_model(network)) if isinstance(network, nn.Module) else None,
    )


def write_options(option_file: str, folder: str) -> None:
    """Write the effective options of a run into its folder, with the command that repeats it on top.

    Without overrides the file is the user's, comments included. Files to import are named by their whole paths.
    """
    source, target = Path(option_file), Path(folder, os.path.basename(option_file))
    text = _text
    named = list(_effective.get('imports') or ())
    imports = [str(find_file(name, option_file)) if name.endswith('.py') else name for name in named]
    if _overrides or imports != named:
        effective = {**_effective, 'imports': imports} if imports else _effective
        text = yaml.dump(effective, Dumper=OptionDumper, sort_keys=False, allow_unicode=True, width=120)
    changed = f'# {source.name} with --force_yml {shlex.join(_overrides)}\n' if _overrides else ''
    head = f'# {time.asctime()}, in {os.getcwd()}:\n# {command_line()}\n{changed}\n'
    target.write_text(head + text, encoding='utf-8')


def command_line() -> str:
    """The command that started this process, as a line for a shell."""
    program, *arguments = sys.argv
    for name, value in DEFAULTS:
        for index in range(len(arguments) - 1):
            if arguments[index : index + 2] == [name, value]:
                del arguments[index : index + 2]
                break
    path = Path(program)
    start = ['python', program]
    if path.parent.name == 'lora_sr' and path.stem in ('train', 'test'):
        start = ['python', '-m', f'lora_sr.{path.stem}']
    elif path.stem == 'lora-sr':
        start = ['lora-sr', 'train']
    elif path.parent.name == 'cli' and path.stem == 'main':
        start = ['python', '-m', 'lora_sr.cli.main', 'train']
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        nodes = os.environ.get('GROUP_WORLD_SIZE', '1')
        launcher = ['torchrun', *(['--nnodes', nodes] if nodes != '1' else [])]
        start = [*launcher, '--nproc_per_node', os.environ.get('LOCAL_WORLD_SIZE', '1'), *start[1:]]
    return shlex.join([*start, *arguments])


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain dictionaries, lists and values."""
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain
