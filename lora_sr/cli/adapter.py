"""`lora-sr adapter`: adapters as files of their own, put onto a base and mixed at will."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lora_sr.cli.arguments import add_network_options, network_source, tell_written, weighted

if TYPE_CHECKING:
    from lora_sr.deploy.adapters import Pairs

EPILOG = """\
examples:
  lora-sr adapter extract experiments/phone/models/net_g_latest.pth -o phone.safetensors
  lora-sr adapter merge SwinIR.pth phone.safetensors -o SwinIR_phone.pth
  lora-sr adapter merge SwinIR.pth phone.safetensors=0.7 jpeg.safetensors=0.5 -o SwinIR_mine.pth
  lora-sr adapter merge SwinIR.pth phone.safetensors jpeg.safetensors -o SwinIR_mine.pth \\
      --fit --gt pairs/HR --lr pairs/LR --scale 4
  lora-sr adapter merge SwinIR.pth peft_run/ -o SwinIR_phone.pth       # a folder that PEFT has written
  lora-sr adapter export SwinIR.pth phone.safetensors --to peft -o phone_peft
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command, with sub-commands of its own, to `lora-sr`."""
    parser = commands.add_parser(
        'adapter',
        help='extract, apply, mix, merge, export and show adapters',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Adapters as files of their own (.safetensors, a few hundred KB), for any network. Those of PEFT, '
        "of kohya's scripts and of LyCORIS go wherever our own do.",
    )
    verbs = parser.add_subparsers(dest='verb', metavar='VERB', required=True)

    extract = verbs.add_parser(
        'extract',
        help='an adapted checkpoint to an adapter file',
        description='Write the adapter of an adapted checkpoint to a file of its own.',
    )
    extract.add_argument('checkpoint', metavar='ADAPTED', help='checkpoint with LoRA (.pth or .safetensors)')
    extract.add_argument('-o', '--output', required=True, metavar='ADAPTER', help='file to write (.safetensors)')
    extract.add_argument('--param-key', help='state dict in the checkpoint (default: found, EMA first)')
    extract.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
    extract.set_defaults(run=run_extract)

    for verb, run, summary, result in (
        ('apply', run_apply, 'a base and adapters to an adapted checkpoint', 'an adapted checkpoint, which trains on'),
        ('merge', run_merge, 'a base and adapters to a plain checkpoint', "a plain checkpoint of the base's network"),
    ):
        mix = verbs.add_parser(
            verb,
            help=summary,
            description=f'Put adapters onto a base checkpoint, each with its weight: {result}. A weight of 0 leaves an '
            'adapter out, 1 is the adapter as it was trained, and others, also beyond 1 and below 0, may be tried.',
        )
        mix.add_argument('base', metavar='BASE', help='checkpoint of the base (.pth or .safetensors)')
        mix.add_argument(
            'adapters',
            nargs='+',
            type=weighted,
            metavar='ADAPTER[=WEIGHT]',
            help='adapter file, or folder of PEFT, and its weight (default: 1, or an equal share with --fit)',
        )
        mix.add_argument('-o', '--output', required=True, help='file to write (.pth or .safetensors)')
        mix.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
        fit = mix.add_argument_group('fitting', 'Find the weights that serve a few pairs of images best.')
        fit.add_argument('--fit', action='store_true', help='begin with the given weights, and improve them')
        fit.add_argument('--gt', metavar='FOLDER', help='original images')
        fit.add_argument(
            '--lr', metavar='FOLDER', help='LR images of the same names (default: of a published set, or by bicubic)'
        )
        fit.add_argument('--scale', type=int, metavar='N', help='scale factor')
        add_network_options(mix, with_adapters=False)
        mix.set_defaults(run=run)

    export = verbs.add_parser(
        'export',
        help='adapters to a folder that PEFT loads',
        description="Write adapters, mixed by their weights, as one adapter in the layout of another program. PEFT's "
        'LoRA of a k x k convolution has another form than ours: such updates are factored anew, exactly, with the '
        'least rank that does. What PEFT has no LoRA for, as the deltas of biases, is refused.',
    )
    export.add_argument('base', metavar='BASE', help='checkpoint of the base (.pth or .safetensors)')
    export.add_argument(
        'adapters',
        nargs='+',
        type=weighted,
        metavar='ADAPTER[=WEIGHT]',
        help='adapter file and its weight (default: 1)',
    )
    export.add_argument('--to', choices=['peft'], default='peft', help='the layout (default: peft)')
    export.add_argument('-o', '--output', required=True, metavar='FOLDER', help='folder to write')
    export.add_argument('--overwrite', action='store_true', help='replace the two files where they exist')
    add_network_options(export, with_adapters=False)
    export.set_defaults(run=run_export)

    info = verbs.add_parser(
        'info',
        help='what is in an adapter',
        description='Show the layers of an adapter, their ranks, and what they add up to.',
    )
    info.add_argument('file', metavar='FILE', help='adapter file, folder of PEFT, or adapted checkpoint')
    info.set_defaults(run=run_info)


def run_extract(args: argparse.Namespace) -> None:
    """Extract, and show what was written."""
    from lora_sr.deploy.adapters import extract_to_file

    print(extract_to_file(args.checkpoint, args.output, args.param_key, args.overwrite))
    tell_written(args.output)


def run_apply(args: argparse.Namespace) -> None:
    """Apply, and print the weights."""
    from lora_sr.deploy.adapters import apply_adapters

    print(apply_adapters(network_source(args, args.base), args.adapters, args.output, args.overwrite, _pairs(args)))
    tell_written(args.output)


def run_merge(args: argparse.Namespace) -> None:
    """Merge, and print the weights."""
    from lora_sr.deploy.adapters import merge_adapters

    print(merge_adapters(network_source(args, args.base), args.adapters, args.output, args.overwrite, _pairs(args)))
    tell_written(args.output)


def run_export(args: argparse.Namespace) -> None:
    """Export, and show what was written."""
    from lora_sr.deploy.adapters import export_adapters

    print(export_adapters(network_source(args, args.base), args.adapters, args.output, args.overwrite))
    tell_written(args.output)


def run_info(args: argparse.Namespace) -> None:
    """Show what is in a file."""
    from lora_sr.deploy.adapters import describe_file

    print(describe_file(args.file))


def _pairs(args: argparse.Namespace) -> Pairs | None:
    from lora_sr.deploy.adapters import Pairs
    from lora_sr.errors import InputError

    given = {'--gt': args.gt, '--lr': args.lr, '--scale': args.scale}
    if not args.fit:
        for name, value in given.items():
            if value is not None:
                raise InputError(f'{name} is for --fit, which is not given.')
        return None
    missing = [name for name, value in given.items() if value is None and name != '--lr']
    if missing:
        raise InputError(f'--fit needs --gt and --scale, but {" and ".join(missing)} is not given.')
    return Pairs(args.gt, args.lr, args.scale)
