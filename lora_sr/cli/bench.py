"""`lora-sr bench`: our speed and memory beside the alternative's, as ratios from one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_sr.cli.arguments import CHECKPOINT, add_network_options, network_source

# Of `lora-sr bench train`: names of benchmarks/train.py, which imports torch.
NETWORKS = ('SPAN', 'DSCLoRA-LKDN', 'LKDN', 'SwinIR-light', 'AdaptSR-SwinIR')
KEYS = ('memory_format', 'amp', 'compile', 'graph', 'clip_grad_norm', 'tf32', 'checkpointing', 'accumulate_iter')


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'bench',
        help='measure speed and memory beside the alternatives',
        description='Measure speed and memory beside the alternatives. Without a SUBJECT it is `runtime`.',
    )
    parser.set_defaults(
        run=run_runtime, checkpoints=[], size=None, options=None, imports=[], param_key=None, force=False
    )
    subjects = parser.add_subparsers(dest='subject', metavar='SUBJECT')

    runtime = subjects.add_parser('runtime', help="deployed networks beside the papers' code")
    runtime.add_argument('checkpoints', nargs='*', metavar='CHECKPOINT', help='SPAN or LKDN (default: random weights)')
    runtime.add_argument(
        '--size',
        type=int,
        nargs=2,
        action='append',
        metavar=('HEIGHT', 'WIDTH'),
        help='of the LR image (default: 256 256); may be repeated',
    )
    add_network_options(runtime)
    runtime.set_defaults(run=run_runtime)

    upscale = subjects.add_parser('upscale', help='`lora-sr upscale` beside its three steps in turn')
    upscale.add_argument('inputs', nargs='+', metavar='INPUT', help='image, folder, or quoted pattern')
    upscale.add_argument('-m', '--model', metavar='CHECKPOINT', help=CHECKPOINT)
    add_network_options(upscale)
    upscale.set_defaults(run=run_upscale)

    affinity = subjects.add_parser('affinity', help='spatial affinity loss: blockwise against naive')
    affinity.add_argument('--size', type=int, default=64, help='height and width of the features (default 64)')
    affinity.set_defaults(run=run_affinity)

    prepare = subjects.add_parser('prepare', help="data preparation against BasicSR's scripts")
    prepare.add_argument('images', type=Path, nargs='+', help='folders of images')
    prepare.add_argument('--scale', type=int, default=4, help='scale of the LR images (default 4)')
    prepare.set_defaults(run=run_prepare)

    loader = subjects.add_parser('loader', help="samples/s of the loader alone: raw images against BasicSR's PNGs")
    loader.add_argument('images', nargs='+', help='folders of images of at least 480 x 480 pixels')
    loader.add_argument('--scale', type=int, default=4, help='scale of the LR images (default 4)')
    loader.add_argument(
        '--workers', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='worker processes (default 0 1 2)'
    )
    loader.set_defaults(run=run_loader)

    lkdn = subjects.add_parser('lkdn', help="LKDN against its authors' structure, in both memory formats")
    lkdn.set_defaults(run=run_lkdn)

    adan = subjects.add_parser('adan', help='a step of Adan against adan_pytorch')
    adan.set_defaults(run=run_adan)

    train = subjects.add_parser('train', help='training key by key, beside stock BasicSR')
    train.add_argument('images', nargs='*', help='folders of images of at least 480 x 480 pixels (default: made ones)')
    train.add_argument(
        '--network',
        nargs='+',
        choices=NETWORKS,
        default=[],
        help='what is trained (default: all but the last on a CPU)',
    )
    train.add_argument('--keys', nargs='+', choices=KEYS, metavar='KEY', help=f'of train: some of {", ".join(KEYS)}')
    train.add_argument('--batch', type=int, metavar='N', help='samples of a batch (default: 16 on a GPU, else 4)')
    train.add_argument('--patch', type=int, metavar='N', help='side of the LR patches (default: 64 on a GPU, else 48)')
    train.add_argument('--iterations', type=int, metavar='N', help='steps before the losses are compared')
    train.add_argument('--device', choices=('cpu', 'cuda'), help='default: a GPU where there is one')
    train.set_defaults(run=run_train)

    startup = subjects.add_parser('startup', help='CPU seconds of imports and commands, beside their budgets')
    startup.add_argument('checkpoint', type=Path, nargs='?', metavar='CHECKPOINT', help='also `lora-sr inspect` it')
    startup.set_defaults(run=run_startup)


def run_runtime(args: argparse.Namespace) -> None:
    """Measure the deployed networks."""
    from lora_sr.benchmarks import runtime as runtime_benchmark

    networks = {Path(file).name: network_source(args, file) for file in args.checkpoints}
    runtime_benchmark.run(networks, [tuple(size) for size in args.size or [(256, 256)]])


def run_upscale(args: argparse.Namespace) -> None:
    """Measure `lora-sr upscale`."""
    from lora_sr.benchmarks import upscale as upscale_benchmark

    upscale_benchmark.run(args.inputs, network_source(args, args.model))


def run_affinity(args: argparse.Namespace) -> None:
    """Measure the affinity loss."""
    from lora_sr.benchmarks import affinity as affinity_benchmark

    affinity_benchmark.run(args.size)


def run_prepare(args: argparse.Namespace) -> None:
    """Measure data preparation."""
    from lora_sr.benchmarks import prepare as prepare_benchmark

    prepare_benchmark.run(args.images, args.scale)


def run_loader(args: argparse.Namespace) -> None:
    """Measure the loader alone."""
    from lora_sr.benchmarks import loader as loader_benchmark

    loader_benchmark.run(args.images, args.scale, args.workers)


def run_lkdn(args: argparse.Namespace) -> None:
    """Measure LKDN."""
    from lora_sr.benchmarks import lkdn as lkdn_benchmark

    lkdn_benchmark.run()


def run_adan(args: argparse.Namespace) -> None:
    """Measure Adan."""
    from lora_sr.benchmarks import adan as adan_benchmark

    adan_benchmark.run()


def run_train(args: argparse.Namespace) -> None:
    """Measure training."""
    from lora_sr.benchmarks import train as train_benchmark

    train_benchmark.run(args.images, args.network, args.keys, args.batch, args.patch, args.iterations, args.device)


def run_startup(args: argparse.Namespace) -> None:
    """Measure what starting costs."""
    from lora_sr.benchmarks import startup as startup_benchmark

    startup_benchmark.run(args.checkpoint)
