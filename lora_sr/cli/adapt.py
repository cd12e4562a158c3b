"""`lora-sr adapt`: from photographs to a better network, by one command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_sr.adapted_folder import REPORT
from lora_sr.cli.arguments import add_network_options, network_source, tell_written
from lora_sr.errors import InputError, printable

NOTHING_GAINED = 3
EPILOG = """\
examples:
  lora-sr adapt LKDN_x2.pth --pairs phone/HR phone/LR -o phone_x2
  lora-sr adapt RealESRGAN_x4plus.pth --photos HR -o mine --minutes 60 --share 5%
  lora-sr adapt SPAN_x4.pth --lr phone/LR --teacher HAT_x4.pth -o phone_x4
  lora-sr upscale photos -m phone_x2/merged.pth -o photos_x2
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'adapt',
        help='adapt a network to the images of a camera',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Adapt a network to a camera by LoRA, from pairs of HR and LR images of the same names. A tenth\n'
        'of the pairs is held back, and every choice is made on them: learning rate, iteration, strength.\n'
        'OUT/report.html shows what it came to, with images before and after.\n'
        'Ctrl-C while it trains keeps the best so far. The same command goes on where it was interrupted.\n'
        'Exit status: 0; 3 if nothing was gained; 2 if something of the input is wrong.',
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='network to adapt (.pth or .safetensors)')
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        '--pairs', nargs=2, metavar=('HR', 'LR'), help='folders of HR images and of the LR images of a camera'
    )
    images.add_argument('--photos', metavar='HR', help='folder of HR images; LR images are made, as by a camera')
    images.add_argument(
        '--lr', metavar='LR', help='folder of LR images of a camera, for which --teacher makes HR images'
    )
    parser.add_argument(
        '--teacher', metavar='CHECKPOINT', help='network of the same scale that makes HR images for --lr'
    )
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help='folder to write')
    parser.add_argument(
        '--minutes', type=float, default=10, metavar='N', help='how long it may take, about (default: 10)'
    )
    parser.add_argument(
        '--share',
        type=_share,
        metavar='P%',
        help='share of the parameters that may train (default: 10%%, or more where LoRA of rank 1 takes more)',
    )
    parser.add_argument(
        '--align', action='store_true', help='undo the shift of LR on HR, by cropping, and give HR the colors of LR'
    )
    parser.add_argument(
        '--from', dest='adapter', metavar='ADAPTER', help='adapter of the network to go on from, of another camera say'
    )
    add_network_options(parser, with_adapters=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Adapt, and say what it came to. Exits with status 3 if nothing was gained."""
    from lora_sr.adapt import Adaptation, Images, adapt
    from lora_sr.checkpoints import NetworkSource

    if (args.lr is None) != (args.teacher is None):
        raise InputError('--lr and --teacher must be given together.')
    hr, lr = args.pairs or (args.photos, args.lr)
    images = Images(
        None if hr is None else Path(hr),
        None if lr is None else Path(lr),
        None if args.teacher is None else NetworkSource(args.teacher),
    )
    adapter = None if args.adapter is None else Path(args.adapter)
    source = network_source(args, args.checkpoint)
    adaptation = Adaptation(source, images, args.minutes, args.share, args.align, adapter)
    outcome = adapt(adaptation, args.output, lambda line: print(printable(line), flush=True))
    try:
        _report(Path(args.output), args.imports)
    finally:
        print(outcome)  # as the last line
    if not outcome.has_gained:
        sys.exit(NOTHING_GAINED)


def _report(folder: Path, imports: Sequence[str]) -> None:
    """Write the report, without which what was adapted is as good."""
    from lora_sr.report.page import write_report

    try:
        write_report(folder, folder / REPORT, imports)
    except InputError as error:
        print(f'lora-sr: note: there is no report: {printable(str(error))}', file=sys.stderr)
    else:
        tell_written(folder / REPORT)


def _share(text: str) -> float:
    number = text.removesuffix('%')
    try:
        value = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} should be a share such as 10%') from None
    return value / 100 if text.endswith('%') else value
