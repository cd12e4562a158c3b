"""`lora-sr allocate`: ranks for the layers of an AdaptSR network, within a budget of parameters."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'allocate',
        help='choose the rank of each layer within a budget of parameters',
        description='Measure the gradients of a few batches, through the dataset, the model and the losses of an '
        'option file with network_g: {type: AdaptSR}, and give rank to the layers where it gains most per parameter. '
        'Writes a new option file with the ranks as rank_pattern; nothing is trained.',
    )
    parser.add_argument('-opt', required=True, metavar='FILE', help='the option file of the run (YAML)')
    parser.add_argument(
        '--budget', required=True, help="trainable parameters, as a share of the base network's (5%%) or a number"
    )
    parser.add_argument('-o', '--output', required=True, metavar='NEW_FILE', help='the option file to write')
    parser.add_argument('--batches', type=int, default=16, metavar='N', help='batches to measure on (default: 16)')
    parser.add_argument('--max-rank', type=int, default=32, metavar='R', help='largest rank of a layer (default: 32)')
    parser.add_argument('--chart', metavar='PICTURE', help='draw the ranks over depth (.png, .svg, .pdf; matplotlib)')
    parser.add_argument('--overwrite', action='store_true', help='replace the new option file where it exists')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Allocate, and print the ranks."""
    from lora_sr.basicsr.rank_allocation import allocate, format_ranks

    allocation = allocate(args.opt, args.budget, args.output, args.batches, args.max_rank, args.chart, args.overwrite)
    print(format_ranks(allocation))
    tell_written(args.output)
    if args.chart:
        tell_written(args.chart)
