"""`lora-sr curves`: a metric over the iterations of training runs, as a picture."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import by_name, named, tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'curves',
        help='picture of PSNR over the iterations of runs',
        description='Draw what the validations of training runs gave, over the iterations. Needs '
        'matplotlib: pip install matplotlib.',
    )
    parser.add_argument(
        'runs', nargs='+', type=named('FOLDER'), metavar='NAME=FOLDER', help='experiments/… and its name'
    )
    parser.add_argument('-o', '--output', required=True, metavar='PICTURE', help='file to write (.png, .svg, .pdf)')
    parser.add_argument('--dataset', nargs='+', metavar='NAME', help='validation sets (default: all)')
    parser.add_argument('--metric', default='psnr', help='name in val.metrics (default: psnr)')
    parser.add_argument('--overwrite', action='store_true', help='replace the picture where it exists')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw the curves."""
    from lora_sr.report.curves import draw_curves

    draw_curves(by_name(args.runs), args.output, args.dataset, args.metric, args.overwrite)
    tell_written(args.output)
