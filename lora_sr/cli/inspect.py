"""`lora-sr inspect`: what a checkpoint is, the layers of a network, what adapts them, and what that costs."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import add_network_options, network_source


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'inspect',
        help='what a checkpoint is, and the layers of a network with their LoRA',
        description='Of a checkpoint: its network, form, scale, LoRA and iteration, and the commands that can be next. '
        'Of its network: the layers, the group and the rank of each, and what share of the parameters trains. Of an '
        'option file these are the layers of network_g as the run would build it, and neither data nor weights are '
        'needed. Equal layers of repeated blocks share a line, which has their sums.',
    )
    parser.add_argument(
        'file', nargs='?', metavar='FILE', help='option file (.yml), checkpoint (.pth, .safetensors) or .state'
    )
    parser.add_argument('--all', action='store_true', help='a line for every layer')
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the summary and the table."""
    from lora_sr.report.summary import inspect_file

    print(inspect_file(network_source(args, args.file), fold=not args.all))
