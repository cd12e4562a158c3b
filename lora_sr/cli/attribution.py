"""`lora-sr attribution`: which LR pixels networks use for a patch of their outputs, as a picture."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lora_sr.cli.arguments import add_network_options, named_networks, tell_written
from lora_sr.errors import printable


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'attribution',
        help='what networks look at: local attribution maps and diffusion index',
        description='Draw which LR pixels each network uses for a window of its output, by local attribution maps (Gu '
        'and Dong, CVPR 2021), and print the diffusion index of each map: the higher, the wider it spreads. The window '
        'is where the outputs of several networks differ most, or where that of one has most detail, unless it is '
        'given.',
    )
    parser.add_argument(
        'networks',
        nargs='+',
        type=_named_or_not,
        metavar='[NAME=]CHECKPOINT',
        help='checkpoint or option file, as of `lora-sr compare`; by default named as its file',
    )
    parser.add_argument('image', metavar='IMAGE', help='LR image')
    parser.add_argument('-o', '--output', required=True, metavar='PICTURE', help='file to write (.png)')
    parser.add_argument(
        '--window',
        nargs=3,
        type=int,
        metavar=('X', 'Y', 'SIDE'),
        help='left, top and side of a square in pixels of the output (default: 16 pixels, found)',
    )
    parser.add_argument(
        '--steps', type=int, default=50, metavar='N', help='steps of the integral, whose time they are (default: 50)'
    )
    parser.add_argument(
        '--context',
        type=int,
        default=64,
        metavar='N',
        help='look at N x N LR pixels around the window; indices compare where it is the same (default: 64)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the picture where it exists')
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw the picture, and print the indices."""
    from lora_sr.report.attribution_picture import draw_attributions

    found = draw_attributions(
        named_networks(args),
        args.image,
        args.output,
        None if args.window is None else tuple(args.window),
        args.steps,
        args.context,
        args.overwrite,
    )
    print(found)
    tell_written(args.output)


def _named_or_not(argument: str) -> tuple[str, str]:
    """A type for argparse: ``NAME=FILE`` or ``FILE``, whose name is that of the file without its suffix."""
    name, equals, file = argument.partition('=')
    if not equals or os.path.exists(argument):
        return printable(Path(argument).stem), argument
    if not (name and file):
        raise argparse.ArgumentTypeError(f'{argument!r} should be NAME=CHECKPOINT or CHECKPOINT')
    return name, file
