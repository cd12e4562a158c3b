"""`lora-sr degrade`: LR images as a camera might have taken them, the same on every machine."""

from __future__ import annotations

import argparse
import sys

from lora_sr.cli.arguments import add_share
from lora_sr.errors import printable

EPILOG = """\
examples:
  lora-sr degrade datasets/benchmark/Set14/GTmod4 -o datasets/benchmark/Set14/LRcamerax4 --scale 4
  lora-sr degrade photos -o photos_LR --scale 4
  lora-sr prepare photos --lr photos_LR -o datasets/photos --scale 4
      Training data: LR images for a folder of photographs, then the pair of LMDBs.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'degrade',
        help='make LR images as a camera might have taken them',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Make an LR image NAME.png for each HR image NAME: anisotropic blur, sampling, shot and read '
        'noise, JPEG.\nTheir strengths and the noise come from the name of the file and the seed, so that the same '
        'images\nare made on every machine. Where images are damaged or too small, they are counted and '
        'nothing is written.\nOf PNG and TIFF of 16 bits all bits count; the LR images have 8, as JPEG has.',
    )
    parser.add_argument('folder', metavar='HR_FOLDER', help='a folder of HR images; sub-folders are not searched')
    parser.add_argument('-o', '--output', required=True, metavar='LR_FOLDER', help='where the LR images go')
    parser.add_argument('--scale', type=int, required=True, metavar='N', help='how many times smaller they are')
    parser.add_argument('--seed', type=int, default=0, help='another seed makes other images (default: 0)')
    parser.add_argument(
        '--skip-broken', action='store_true', help='leave out the images that cannot be used, and say how many'
    )
    parser.add_argument('--workers', type=int, metavar='N', help='number of threads (default: the number of cores)')
    parser.add_argument('--overwrite', action='store_true', help='replace other images of the same names')
    add_share(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the images and say how many."""
    from lora_sr.data.degrade import degrade_folder
    from lora_sr.data.sources import name_images
    from lora_sr.share import own_share

    share = own_share(args.share)
    degraded = degrade_folder(
        args.folder,
        args.output,
        args.scale,
        args.seed,
        args.workers,
        args.overwrite,
        skip_broken=args.skip_broken,
        share=share,
        progress=share is None or share.is_first_here,
    )
    of_share = '' if share is None else f', {share}'
    print(f'{printable(args.output)}: {degraded.images} images at scale {args.scale}{of_share}')
    if degraded.left_out:
        total = degraded.images + len(degraded.left_out)
        print(f'lora-sr: note: {name_images(degraded.left_out.values(), total, "left out")}', file=sys.stderr)
