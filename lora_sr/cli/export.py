"""`lora-sr export`: a deployed network as a file for other programs."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import CHECKPOINT, add_network_options, network_source, tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command, with a sub-command for each format, to `lora-sr`."""
    parser = commands.add_parser(
        'export',
        help='write a network as ONNX, as TorchScript, or for chaiNNer',
        description='Write the network of a checkpoint for other programs: LoRA merged, branches folded, any image '
        'size. The file is run on images of three sizes beside the network before it gets its name.',
    )
    formats = parser.add_subparsers(dest='format', metavar='FORMAT', required=True)
    for name, summary, suffixes in (
        ('onnx', 'ONNX, for onnxruntime, DirectML, TensorRT, …', '.onnx'),
        ('torchscript', 'TorchScript, for libtorch and ncnn', '.pt'),
        ('chainner', 'a checkpoint that chaiNNer and spandrel load', '.pth or .safetensors'),
    ):
        command = formats.add_parser(name, help=summary, description=f'Write a network as {summary}.')
        command.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT', help=CHECKPOINT)
        command.add_argument('-o', '--output', required=True, metavar='FILE', help=f'file to write ({suffixes})')
        if name == 'onnx':
            command.add_argument(
                '--dtype',
                choices=['float32', 'float16'],
                default='float32',
                help='of weights and features; images are float32 (default: float32)',
            )
        command.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
        add_network_options(command)
        command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export, and print what was measured."""
    from lora_sr.deploy import exports

    export = getattr(exports, f'export_{args.format}')
    options = {'dtype': args.dtype} if args.format == 'onnx' else {}
    print(export(network_source(args, args.checkpoint), args.output, overwrite=args.overwrite, **options))
    tell_written(args.output)
