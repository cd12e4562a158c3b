"""`lora-sr prepare`: folders of images to the LMDB pairs that BasicSR reads."""

from __future__ import annotations

import argparse
import os
import sys

from lora_sr.cli.arguments import add_share
from lora_sr.errors import printable

EPILOG = """\
examples:
  lora-sr prepare DIV2K Flickr2K -o datasets/DF2K
      The roots of the published sets (DIV2K_train_HR, DIV2K_train_LR_bicubic/X2, ...) or any folders of images;
      writes HR_sub.lmdb and LR_bicubic_X2_sub.lmdb, LR_bicubic_X3_sub.lmdb, LR_bicubic_X4_sub.lmdb.
  lora-sr prepare photos -o datasets/photos --scale 4
  lora-sr prepare val_HR --lr val_LR -o datasets/val --scale 4 --size 0
      Whole images, for validation: HR.lmdb and LR_X4.lmdb, or LR_bicubic_X4.lmdb if val_LR were called LR_bicubic.
  lora-sr prepare "RealSR(V3)" --split train -o datasets/RealSR/train --scale 4
  lora-sr prepare "RealSR(V3)" --split test -o datasets/RealSR/test --scale 4 --size 0
      Pairs from cameras, of RealSR or DRealSR: HR_sub.lmdb and LR_X4_sub.lmdb; HR.lmdb and LR_X4.lmdb.
  lora-sr prepare DIV2K Flickr2K -o datasets/DF2K --scale 4 --raw
      Whole images, uncompressed: HR_raw.lmdb and LR_bicubic_X4_raw.lmdb, for the types RawPairedImageDataset and
      RawLRImageDataset, which decode nothing.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'prepare',
        help='make the LMDB pairs for training from folders of images',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Cut HR images and their LR images into sub-images and write them as paired LMDBs for BasicSR. '
        'LR images\nthat are not there are made by MATLAB-compatible bicubic. Where an image cannot be used, as it is '
        'damaged,\ntoo small, or without a partner of the right size, all such images are counted and nothing is '
        'written.\nPNG and TIFF of 16 bits keep them, and training reads them.',
    )
    parser.add_argument(
        'folders',
        nargs='+',
        metavar='HR_FOLDER',
        help='a folder of HR images, or the root of DIV2K, Flickr2K, RealSR (version 3) or DRealSR; other sub-folders '
        'are not searched',
    )
    parser.add_argument('-o', '--output', required=True, metavar='FOLDER', help='where the databases go')
    parser.add_argument(
        '--scale',
        nargs='+',
        type=int,
        default=[2, 3, 4],
        metavar='N',
        help='scales of the LR images (default: 2 3 4); one HR database serves all',
    )
    parser.add_argument(
        '--lr',
        nargs='+',
        metavar='FOLDER',
        help='the LR folder of each HR folder, in their order, with images NAME or NAMEx4, or with a '
        'folder X2, X3, ... for each scale (default: NAME_LR_bicubic/X4 beside NAME_HR, if there)',
    )
    parser.add_argument(
        '--border',
        metavar='NAME',
        help='replicate or mirror: what bicubic sees beyond the edges of an image (default: replicate, as in the '
        'published test sets; MATLAB mirrors today)',
    )
    parser.add_argument(
        '--split',
        metavar='PART',
        help='train or test: the part of RealSR or DRealSR, needed where the folder has both',
    )
    parser.add_argument(
        '--size',
        type=int,
        metavar='PIXELS',
        help='side of an HR sub-image (default: 480); 0 keeps images whole',
    )
    parser.add_argument(
        '--step',
        type=int,
        default=240,
        metavar='PIXELS',
        help='distance between neighboring HR sub-images (default: 240)',
    )
    parser.add_argument(
        '--threshold',
        type=int,
        default=0,
        metavar='PIXELS',
        help='leave out a strip of up to this many HR pixels at the right or bottom edge (default: 0)',
    )
    parser.add_argument(
        '--skip-broken', action='store_true', help='leave out the images that cannot be used, and say how many'
    )
    parser.add_argument(
        '--crop',
        action='store_true',
        help='trim HR and LR images whose sizes differ by up to two LR pixels, at the right and bottom: their top left '
        'corners must show the same',
    )
    parser.add_argument(
        '--raw',
        action='store_true',
        help='store whole images uncompressed, of which training reads no more than its patches',
    )
    parser.add_argument('--workers', type=int, metavar='N', help='number of threads (default: the number of cores)')
    parser.add_argument('--overwrite', action='store_true', help='replace databases of the same names')
    add_share(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prepare the databases and say what was made."""
    from lora_sr.data.prepare import prepare_databases
    from lora_sr.data.sources import left_out, name_images
    from lora_sr.share import NotLastError, own_share

    share = own_share(args.share)
    try:
        prepared = prepare_databases(
            args.folders,
            args.output,
            args.scale,
            args.lr,
            args.size,
            args.step,
            args.threshold,
            args.workers,
            args.overwrite,
            split=args.split,
            border=args.border,
            skip_broken=args.skip_broken,
            crop=args.crop,
            share=share,
            raw=args.raw,
            progress=share is None or share.is_first_here,
        )
    except NotLastError:
        print(f'{printable(args.output)}: {share} is done; the process that comes last puts all together')
        return
    except KeyboardInterrupt:
        print(
            f'lora-sr: interrupted: no unfinished database is left in {args.output}; run the same command again.',
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    for folder in args.folders:
        others = left_out(folder)
        if others:
            more = f', and {len(others) - 3} more' if len(others) > 3 else ''
            print(printable(f'not read in {folder}: {", ".join(others[:3])}{more}'), file=sys.stderr)
    height, width = prepared.smallest
    for path in prepared.databases.values():
        print(f'{printable(os.fspath(path))}: {prepared.entries} entries of {prepared.images} images')
    print(
        f'checked: counts, keys and sizes agree; the smallest HR entry has {width} x {height} pixels, '
        f'so gt_size can be up to {min(height, width)}'
    )
    png, raw = (shown_bytes(prepared.bytes[form]) for form in ('png', 'raw'))
    if args.raw:
        print(f'on disk: {raw} raw; as PNG sub-images of 480 x 480 pixels it would be about {png}')
    else:
        print(f'on disk: {png} as PNG; raw, whole and uncompressed (--raw), it would be {raw}')
    if prepared.left_out:
        total = prepared.images + len(prepared.left_out)
        note = name_images(prepared.left_out.values(), total, 'left out')
        print(f'lora-sr: note: {note}', file=sys.stderr)


def shown_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f'{count / 1e9:.1f} GB' if count >= 1e9 else f'{count / 1e6:.1f} MB'
