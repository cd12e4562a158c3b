"""Option files and the command line: nothing of them is run as code."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import yaml

from lora_sr.basicsr import launcher, provenance, run_folder, signals
from lora_sr.basicsr.log import start_log
from lora_sr.basicsr.patches.distributed import start_distributed
from lora_sr.basicsr.patches.resume import patch_load_resume_state
from lora_sr.basicsr.patches.samples import patch_create_train_val_dataloader
from lora_sr.basicsr.patches.tools import is_defective, patch, replace_everywhere, swapped
from lora_sr.checkpoints.content import forget, remember
from lora_sr.checkpoints.imports import import_modules
from lora_sr.errors import InputError, is_first_process, sentences
from lora_sr.option_file import OptionDumper, OptionLoader, apply_overrides, load_options

CHECK_VARIABLE = 'LORA_SR_CHECK'  # 0 in the environment switches the check off
_mode = 'exit'
_starters: list[str] = []  # of the processes of the run at hand


@contextlib.contextmanager
def mistakes(mode: str) -> Iterator[None]:
    """Say what `parse_options` does about mistakes in the options.

    Args:
        mode: ``exit`` (the default, for a ``train.py`` that knows nothing of us) tells them and exits with status 2;
            ``raise`` raises an InputError; ``skip`` does so for what cannot be read, and does not check the rest.
    """
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def tell(error: Exception) -> None:
    """Print a mistake, an ``error: …`` for each of its lines, in the first process of each machine."""
    if is_first_process():
        for line in sentences(str(error), sys.argv[1:]).split('\n'):
            print(f'error: {line}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """End the process with a mistake that has been told, or hand it on, as :func:`mistakes` says."""
    try:
        yield
    except InputError as error:
        forget()
        if _mode != 'exit':
            raise
        tell(error)
        sys.exit(2)


def patch_ordered_yaml() -> None:
    """`ordered_yaml` gives a loader that runs code (`!!python/object/apply:…`) and reads `1e-4` as a string."""
    from basicsr.utils import options

    if not issubclass(options.ordered_yaml()[0], yaml.constructor.FullConstructor):
        return

    @patch
    def ordered_yaml() -> tuple[type, type]:
        return OptionLoader, OptionDumper

    replace_everywhere(options.ordered_yaml, ordered_yaml)


def patch_parse_options() -> None:
    """`parse_options` runs `--force_yml` through `exec` and `eval`, too late for the seed, and adds unknown keys.

    It checks nothing of what it reads, either, and gives `dist_params` to `init_dist` under slurm alone. It is wrapped,
    never copied, since it differs between BasicSR's versions. As every pipeline calls it first, it also patches a
    `load_resume_state` that a script has defined after `import lora_sr`.
    """
    from basicsr.utils import options

    original = options.parse_options
    if getattr(original, 'is_patch', False):
        return
    namespace = original.__globals__

    @patch
    @functools.wraps(original)
    def parse_options(root_path: str, is_train: bool = True) -> tuple[dict, argparse.Namespace]:
        patch_load_resume_state()
        patch_create_train_val_dataloader()
        path, entries, rest = _split_command_line(sys.argv[1:])
        if path is None:
            return original(root_path, is_train)  # argparse tells what is missing, or prints the help
        with _told():
            launcher.check(_launcher_of(rest))
            opt = load_options(path)
            apply_overrides(opt, entries)
            provenance.begin(path, opt, entries)
            start_log()
            signals.begin()
            import_modules(_modules_to_import(opt), path)
            from lora_sr.basicsr.options.whole_numbers import make_whole

            make_whole(opt)
            remember()  # until the networks have been set up
            if _mode != 'skip' and os.environ.get(CHECK_VARIABLE) != '0':
                _check(opt, is_train, root_path, rest)

        def init_dist(launcher: str, **_: Any) -> None:
            start_distributed(launcher, opt)

        argv = [sys.argv[0], '-opt', path, *rest]
        loader = functools.partial(_PreparedOptions, opt)
        _complete_paths(opt)
        lists = _take_lists_of_roots(opt)
        with swapped(namespace, ordered_yaml=lambda: (loader, OptionDumper), init_dist=init_dist):
            with swapped(vars(sys), argv=argv):
                opt, args = original(root_path, is_train)
        for name, roots in lists.items():
            opt['datasets'][name].update(roots)
        args.force_yml = entries
        if is_train and _mode != 'skip':  # which only looks at the options
            _begin(opt)
        return opt, args

    replace_everywhere(original, parse_options)


def _begin(opt: dict) -> None:
    """Claim the folder of a run, and go on with it where this is no first start."""
    global _starters
    folder = opt['path']['experiments_root']
    _starters = launcher.all_starters()
    is_again = launcher.of_first(launcher.is_started_again(folder, _starters))
    opt['auto_resume'] = opt['auto_resume'] or is_again
    if opt['rank'] == 0:
        with _told():
            run_folder.claim(folder, run_folder.WAIT_FOR_LOST if is_again else 0.0)


def _modules_to_import(opt: dict) -> list[str]:
    """The option `imports`; of what is no list of names, nothing, which the check tells."""
    names = opt.get('imports')
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def patch_copy_opt_file() -> None:
    """`copy_opt_file` copies the file as it is, without what `--force_yml` changed: no record of the run."""
    from basicsr.utils import options
    from basicsr.utils.dist_util import get_dist_info

    original = options.copy_opt_file
    if not is_defective(original, 'copyfile'):
        return

    @patch
    @functools.wraps(original)
    def copy_opt_file(opt_file: str, experiments_root: str) -> None:
        if get_dist_info()[0] == 0:  # the process that has made the folder
            run_folder.hold(experiments_root)
            launcher.record(experiments_root, _starters)
            provenance.write_options(opt_file, experiments_root)

    replace_everywhere(original, copy_opt_file)


def _check(opt: dict, is_train: bool, root_path: str, argv: list[str]) -> None:
    from lora_sr.basicsr.options import check_options

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--auto_resume', action='store_true')
    args, _ = parser.parse_known_args(argv)
    processes = launcher.processes(_launcher_of(argv))
    problems = check_options({**opt, 'auto_resume': args.auto_resume}, is_train, root_path, processes)
    if 'auto_resume' in opt:
        problems.insert(0, 'auto_resume is not a known key; it is an argument of the command line, --auto_resume')
    if problems:
        raise InputError('\n'.join(problems))


def _launcher_of(argv: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--launcher', default='none')
    return parser.parse_known_args(argv)[0].launcher


def _complete_paths(opt: dict) -> None:
    """Paths of data sets as BasicSR takes them: without a `/` at the end, which hides `.lmdb`, and without a `~`."""
    for section in opt['datasets'].values():
        for key in section if isinstance(section, dict) else ():
            if key.startswith(('dataroot', 'meta_info')):
                value = section[key]
                section[key] = [_complete(one) for one in value] if isinstance(value, list) else _complete(value)


def _complete(path: Any) -> Any:
    return os.path.expanduser(path).rstrip('/') or '/' if isinstance(path, str) else path


def _take_lists_of_roots(opt: dict) -> dict[str, dict[str, list]]:
    """Take lists of roots, which `parse_options` takes for one path, out of the sections of the data sets."""
    sections = {name: section for name, section in opt['datasets'].items() if isinstance(section, dict)}
    return {
        name: {key: section.pop(key) for key in ('dataroot_gt', 'dataroot_lq') if isinstance(section.get(key), list)}
        for name, section in sections.items()
    }


class _PreparedOptions:
    """Stands in for a YAML loader where the options have been read already."""

    def __init__(self, options: dict, stream: Any):
        self.options = options

    def get_single_data(self) -> dict:
        return self.options

    def dispose(self) -> None:
        pass


def _split_command_line(argv: list[str]) -> tuple[str | None, list[str] | None, list[str]]:
    """The option file, the entries of `--force_yml` and all other arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('-opt')
    parser.add_argument('--force_yml', nargs='+', default=None)
    known, rest = parser.parse_known_args(argv)
    # As torch.distributed.launch calls it; torch itself changed the name.
    rest = [re.sub('^--local-rank', '--local_rank', argument) for argument in rest]
    return known.opt, known.force_yml, rest


def patch_network_options() -> None:
    """Models read arguments of the generator from `network_g`, which `AdaptSR` has in a section `base` of its own.

    `SwinIRModel` looks for its `window_size` so.
    """
    from basicsr.models.base_model import BaseModel

    original = BaseModel.__init__
    if getattr(original, 'is_patch', False):
        return

    @patch
    @functools.wraps(original)
    def __init__(self: Any, opt: dict) -> None:
        for key, section in opt.items():
            if key.startswith('network_') and isinstance(section, dict) and isinstance(section.get('base'), dict):
                opt[key] = _NestedOptions(section)
        original(self, opt)

    BaseModel.__init__ = __init__


class _NestedOptions(dict):
    """The section of a network around another: what it lacks is looked up in the section of that one, `base`."""

    def __missing__(self, key: str) -> Any:
        return self['base'][key]

    def get(self, key: str, default: Any = None) -> Any:
        return dict.get(self, key, self['base'].get(key, default))
