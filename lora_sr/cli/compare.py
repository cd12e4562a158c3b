"""`lora-sr compare`: networks beside bicubic interpolation, on a folder of images."""

from lora_sr.cli.arguments import by_name, named


def add_parser(commands):
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'compare',
        help='table and picture of networks beside bicubic',
        description='Measure networks and bicubic interpolation on a folder of images: PSNR and SSIM on the Y '
        'channel, parameters, multiply-adds for an output of 1280x720, and a picture of details side by side.',
    )
    parser.add_argument('checkpoints', nargs='+', type=named('CHECKPOINT'), metavar='NAME=CHECKPOINT')
    parser.add_argument('--gt', required=True, metavar='FOLDER', help='original images')
    parser.add_argument('--lr', metavar='FOLDER', help='LR images of the same names (default: made by bicubic)')
    parser.add_argument('--scale', type=int, required=True, help='scale factor')
    parser.add_argument('--picture', metavar='PNG', help='write details of all versions side by side')
    parser.set_defaults(run=run)


def run(args):
    """Compare, and print the table."""
    from lora_sr.evaluation.comparison import compare, format_table

    print(format_table(compare(args.gt, args.scale, by_name(args.checkpoints), args.lr, args.picture)))
    if args.picture:
        print(f'wrote {args.picture}')
