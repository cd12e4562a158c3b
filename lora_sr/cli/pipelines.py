"""`lora-sr train` and `lora-sr test`: BasicSR's own pipelines, after a check of the option file."""

import argparse
import os
import sys

import torch.distributed as dist
from basicsr.test import test_pipeline
from basicsr.train import train_pipeline

from lora_sr.basicsr.options import check_options
from lora_sr.errors import InputError
from lora_sr.option_file import apply_overrides, load_options


def add_parser(commands) -> None:
    """Add `train` and `test` to `lora-sr`."""
    for name, is_train, summary in (
        ('train', True, 'train a network as an option file says (BasicSR)'),
        ('test', False, 'run a network on the test sets of an option file (BasicSR)'),
    ):
        parser = commands.add_parser(name, help=summary, description=summary)
        add_arguments(parser)
        parser.set_defaults(run=lambda args, is_train=is_train: run_command(args, is_train))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of BasicSR's `train.py` and `test.py`."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='the option file (YAML)')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='who starts processes')
    parser.add_argument('--auto_resume', action='store_true', help='go on with the run of that name where it stopped')
    parser.add_argument('--debug', action='store_true', help='log and validate often, under a name of its own')
    parser.add_argument('--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--force_yml', nargs='+', metavar='A:B=VALUE', help='change the option file, e.g. train:optim_g:lr=1e-4'
    )


def run_command(args: argparse.Namespace, is_train: bool) -> None:
    """Run a pipeline for `lora-sr`. Exits with status 2 after a mistake in the input."""
    argv = ['-opt', args.opt, '--launcher', args.launcher, '--local_rank', str(args.local_rank)]
    argv += [flag for flag, wanted in (('--auto_resume', args.auto_resume), ('--debug', args.debug)) if wanted]
    argv += ['--force_yml', *args.force_yml] if args.force_yml else []
    status = main(is_train, argv)
    if status:
        sys.exit(status)


def main(is_train: bool, argv=None) -> int:
    """Check the option file, then run BasicSR's pipeline in the current folder.

    Returns the exit status: 0; 2 after mistakes in the input, each told in a line on the standard error by the first
    process of each machine; or 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        run_pipeline(is_train, argv)
    except InputError as error:
        if int(os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', 0))) == 0:
            for line in str(error).splitlines():
                print(f'error: {line}', file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        hint = '; --auto_resume goes on from its last checkpoint' if is_train else ''
        print(f'interrupted{hint}', file=sys.stderr, flush=True)
        return 130
    return 0


def run_pipeline(is_train: bool, argv: list) -> None:
    """Check the option file named in `argv`, then run BasicSR's `train_pipeline` or `test_pipeline`.

    Raises:
        InputError: something is wrong with the input; before the run starts, all that is wrong, a sentence a line.
    """
    parser = argparse.ArgumentParser(prog=f'python -m lora_sr.{"train" if is_train else "test"}')
    add_arguments(parser)
    args = parser.parse_args(argv)
    opt = load_options(args.opt)
    apply_overrides(opt, args.force_yml)
    opt['auto_resume'] = args.auto_resume
    problems = check_options(opt, is_train, os.getcwd(), _processes(args.launcher))
    if problems:
        raise InputError('\n'.join(problems))

    before = sys.argv
    sys.argv = [before[0], *argv]  # BasicSR reads it, and copies it into the experiment's option file
    try:
        (train_pipeline if is_train else test_pipeline)(os.getcwd())
    finally:
        sys.argv = before
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _processes(launcher: str) -> int:
    """How many processes the launcher has started, on all machines."""
    variable = {'pytorch': 'WORLD_SIZE', 'slurm': 'SLURM_NTASKS'}.get(launcher)
    return int(os.environ.get(variable, 1)) if variable else 1
