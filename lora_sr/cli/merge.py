"""`lora-sr merge`: a training checkpoint to its deploy form."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import CHECKPOINT, add_network_options, network_source, tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'merge',
        help='merge LoRA and fold branches into a plain checkpoint',
        description='Take a training checkpoint to a plain checkpoint of the stock network: merge its LoRA, then fold '
        'its reparameterized branches, whichever it has, and check that both give the same images.',
    )
    parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT', help=CHECKPOINT)
    parser.add_argument('-o', '--output', required=True, help='file to write (.pth or .safetensors)')
    parser.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Merge and fold, and print what was measured."""
    from lora_sr.deploy.merge import merge_checkpoint

    print(merge_checkpoint(network_source(args, args.checkpoint), args.output, overwrite=args.overwrite))
    tell_written(args.output)
