"""`lora-sr benchmark`: our speed and memory beside the alternative's, as ratios from one run."""

from pathlib import Path


def add_parser(commands):
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser('benchmark', help='measure speed and memory beside the alternatives')
    subjects = parser.add_subparsers(dest='subject', metavar='SUBJECT', required=True)

    affinity = subjects.add_parser('affinity', help='spatial affinity loss: blockwise against naive')
    affinity.add_argument('--size', type=int, default=64, help='height and width of the features (default 64)')
    affinity.set_defaults(run=run_affinity)

    prepare = subjects.add_parser('prepare', help="data preparation against BasicSR's scripts")
    prepare.add_argument('images', type=Path, nargs='+', help='folders of images')
    prepare.add_argument('--scale', type=int, default=4, help='scale of the LR images (default 4)')
    prepare.set_defaults(run=run_prepare)

    lkdn = subjects.add_parser('lkdn', help="LKDN against its authors' structure, in both memory formats")
    lkdn.set_defaults(run=run_lkdn)

    adan = subjects.add_parser('adan', help='a step of Adan against adan_pytorch')
    adan.set_defaults(run=run_adan)


def run_affinity(args):
    """Measure the affinity loss."""
    from lora_sr.evaluation import affinity_benchmark

    affinity_benchmark.run(args.size)


def run_prepare(args):
    """Measure data preparation."""
    from lora_sr.evaluation import prepare_benchmark

    prepare_benchmark.run(args.images, args.scale)


def run_lkdn(args):
    """Measure LKDN."""
    from lora_sr.evaluation import lkdn_benchmark

    lkdn_benchmark.run()


def run_adan(args):
    """Measure Adan."""
    from lora_sr.evaluation import adan_benchmark

    adan_benchmark.run()
