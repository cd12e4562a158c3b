"""`lora-sr compare`: networks beside each other and beside bicubic interpolation, in one table."""

from __future__ import annotations

import argparse
import os
import sys

from lora_sr.cli.arguments import add_network_options, add_share, by_name, named, named_networks, tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'compare',
        help='one table of networks on sets of images: quality, counts, runtime, score',
        description='Measure networks, in deploy form, and bicubic interpolation on sets of images: PSNR and SSIM on '
        'the Y channel, parameters, multiply-adds, activations and convolutions; runtime, peak memory and the score of '
        'the NTIRE challenge on request. Without a set, the costs alone.',
    )
    parser.add_argument(
        'networks',
        nargs='+',
        type=named('FILE'),
        metavar='NAME=FILE',
        help="checkpoint, or option file of BasicSR (.yml) with any registered network and its path's weights; "
        '-opt serves those whose network it is; adapters go onto each',
    )
    parser.add_argument(
        '--set',
        dest='sets',
        action='append',
        default=[],
        type=named('GT_FOLDER[,LR_FOLDER]'),
        metavar='NAME=GT[,LR]',
        help='original images and LR images of the same names (default: made by bicubic); for each set once',
    )
    parser.add_argument('--rgb', action='store_true', help='PSNR and SSIM on RGB too')
    parser.add_argument('--runtime', action='store_true', help='measure runtime and peak memory, which takes a while')
    parser.add_argument('--baseline', metavar='NAME', help='NTIRE score relative to this network; measures the runtime')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='input for runtime and memory (default: 256 256)',
    )
    parser.add_argument(
        '-o',
        '--output',
        dest='outputs',
        action='append',
        metavar='FILE',
        help='write the table as well (.md, .csv or .json); may be given several times',
    )
    parser.add_argument('--plot', metavar='FILE', help='draw PSNR over multiply-adds (.png, .svg, .pdf; matplotlib)')
    parser.add_argument('--picture', metavar='PNG', help='write details of all versions side by side')
    parser.add_argument('--overwrite', action='store_true', help='replace files that exist')
    parser.add_argument(
        '--skip-broken', action='store_true', help='leave out the images that cannot be used, and say how many'
    )
    add_share(parser)
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compare, and print the table."""
    from lora_sr.report.comparison import compare
    from lora_sr.report.tables import format_table
    from lora_sr.share import NotLastError, own_share

    share = own_share(args.share)
    try:
        comparison = compare(
            named_networks(args),
            {name: _folders(value) for name, value in by_name(args.sets).items()},
            rgb=args.rgb,
            runtime=args.runtime,
            baseline=args.baseline,
            size=args.size,
            outputs=args.outputs,
            plot=args.plot,
            picture=args.picture,
            overwrite=args.overwrite,
            skip_broken=args.skip_broken,
            on_table=lambda comparison: print(format_table(comparison), flush=True),
            share=share,
        )
    except NotLastError:
        print(f'{share} is done; the process that comes last writes the table')
        return
    for file in (*(args.outputs or ()), args.plot, args.picture):
        if file:
            tell_written(file)
    if comparison.note:
        print(f'lora-sr: note: {comparison.note}', file=sys.stderr)


def _folders(value: str) -> tuple[str, str | None]:
    """The folder of originals, and that of LR images where there is a comma that is not part of a name."""
    if os.path.isdir(value):
        return value, None
    gt, _, lr = value.partition(',')
    return gt, lr or None
