"""`lora-sr upscale`: images through a trained network."""

from __future__ import annotations

import argparse
import sys

from lora_sr.cli.arguments import CHECKPOINT, add_network_options, add_share, network_source
from lora_sr.errors import printable

EPILOG = """\
examples:
  lora-sr upscale photos -m SPAN_x4.pth -o photos_x4
  lora-sr upscale 'scans/*.tif' cover.png -m SPAN_x4.pth -o upscaled --format png
  lora-sr upscale photo.jpg -m SwinIR.pth --adapter phone.safetensors=0.7 -o photo_x4.png --tile 256
  torchrun --nproc-per-node 4 -m lora_sr.cli.main upscale photos -m SPAN_x4.pth -o photos_x4 --share --skip-existing
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'upscale',
        help='upscale images with a trained network',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Upscale PNG, JPEG, WebP, TIFF, BMP, TGA, JPEG 2000 and AVIF images: gray or RGB, with or without\n'
        'alpha, of 8 bits, of 16 bits (PNG, TIFF and JPEG 2000), and of floating point (TIFF).\n'
        'Names, sub-folders, ICC profiles and EXIF are kept. Exit status: 0; 1 if some images failed, which are\n'
        'named at the end; 2 if the call is wrong, or the output cannot be written.',
    )
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='image, folder, or quoted pattern')
    parser.add_argument('-m', '--model', metavar='CHECKPOINT', help=CHECKPOINT)
    parser.add_argument('-o', '--output', required=True, metavar='OUT', help='folder; or file, for one image')
    parser.add_argument(
        '--tile',
        type=int,
        metavar='N',
        help='run tiles of N x N input pixels (default: the whole image, or tiles of some 512 MiB, 8 GiB on CUDA)',
    )
    parser.add_argument(
        '--dtype',
        choices=('float32', 'bfloat16', 'float16'),
        default='float32',
        help='what the network computes in (default: float32)',
    )
    parser.add_argument(
        '--format',
        choices=('png', 'jpeg', 'webp', 'tiff', 'bmp', 'tga', 'jp2', 'j2k', 'avif'),
        help="format of the output; jp2 is JPEG 2000, and j2k its pixels alone (default: each input's own)",
    )
    parser.add_argument(
        '--quality',
        type=int,
        default=95,
        metavar='Q',
        help='of JPEG, WebP, JPEG 2000 and AVIF, 1 to 100; at 100 WebP and JPEG 2000 are lossless (default: 95)',
    )
    parser.add_argument(
        '--alpha',
        choices=('bicubic', 'network'),
        default='bicubic',
        help='what enlarges an alpha channel: interpolation, or the network as a gray image (default: bicubic)',
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument('--overwrite', action='store_true', help='replace outputs that exist')
    existing.add_argument(
        '--skip-existing', action='store_true', help='leave out images whose outputs exist: go on after a stopped run'
    )
    add_share(parser)
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Upscale, print the speed, and name what failed. Exits with status 1 if something did."""
    from lora_sr.deploy.upscale import DTYPES, upscale
    from lora_sr.share import own_share

    share = own_share(args.share)
    try:
        report = upscale(
            args.inputs,
            network_source(args, args.model),
            args.output,
            args.tile,
            DTYPES[args.dtype],
            args.format,
            args.quality,
            args.overwrite,
            progress=share is None or share.is_first_here,
            skip_existing=args.skip_existing,
            alpha=args.alpha,
            share=share,
        )
    except KeyboardInterrupt:
        print('interrupted; what was written is whole', file=sys.stderr)
        sys.exit(130)
    for note in report.notes:
        print(f'lora-sr: note: {printable(note)}', file=sys.stderr)
    print(report if share is None else f'{report}, {share}')
    for failure in report.failures.values():
        print(f'lora-sr: error: {printable(failure)}', file=sys.stderr)
    if report.failures:
        sys.exit(1)
