"""`lora-sr train` and `lora-sr test`: BasicSR's own pipelines, in which the patches check the option file."""

from __future__ import annotations

import argparse
import sys


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
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


def main(is_train: bool, argv: list[str] | None = None) -> int:
    """Run a pipeline with that command line; returns the exit status, see :func:`lora_sr.basicsr.pipelines.run`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog=f'python -m lora_sr.{"train" if is_train else "test"}')
    add_arguments(parser)
    parser.parse_args(argv)  # for a usage of its own, and a help with every argument
    from lora_sr.basicsr import pipelines

    return pipelines.run(is_train, argv)
