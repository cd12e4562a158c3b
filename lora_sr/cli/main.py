"""`lora-sr`: one command, a sub-command for each step of the work."""

import argparse
import sys

from lora_sr.cli import (
    adapter,
    allocate,
    bench,
    compare,
    curves,
    degrade,
    export,
    inspect,
    merge,
    pipelines,
    prepare,
    submission,
    upscale,
)
from lora_sr.errors import InputError

PREPARING, TRAINING = (prepare, degrade), (inspect, allocate, pipelines)
DEPLOYING, MEASURING = (merge, adapter, upscale, export, submission), (compare, curves, bench)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `lora-sr`; each sub-command sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(prog='lora-sr', description='LoRA and distillation for SR, on BasicSR.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for module in (*PREPARING, *TRAINING, *DEPLOYING, *MEASURING):
        module.add_parser(commands)
    return parser


def main(argv=None) -> int:
    """Run `lora-sr`. Returns the exit status: 0, or 2 after a mistake in the input, told in one sentence a line."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except InputError as error:
        print(f'lora-sr: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
