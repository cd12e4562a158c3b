"""`lora-sr export`: a deployed network as a file for other programs."""


def add_parser(commands):
    """Add the sub-command, with a sub-command for each format, to `lora-sr`."""
    parser = commands.add_parser(
        'export',
        help='write a network as ONNX, as TorchScript, or for chaiNNer',
        description='Write the network of a checkpoint for other programs: LoRA merged, branches folded, any image '
        'size. The file is run on images of three sizes beside the network before it gets its name.',
    )
    formats = parser.add_subparsers(dest='format', metavar='FORMAT', required=True)
    for name, run, summary, suffixes in (
        ('onnx', run_onnx, 'ONNX, for onnxruntime, DirectML, TensorRT, …', '.onnx'),
        ('torchscript', run_torchscript, 'TorchScript, for libtorch and ncnn', '.pt'),
        ('chainner', run_chainner, 'a checkpoint that chaiNNer and spandrel load', '.pth or .safetensors'),
    ):
        command = formats.add_parser(name, help=summary, description=f'Write a network as {summary}.')
        command.add_argument('checkpoint', help='checkpoint, trained or merged (.pth or .safetensors)')
        command.add_argument('-o', '--output', required=True, metavar='FILE', help=f'file to write ({suffixes})')
        if name == 'onnx':
            command.add_argument(
                '--dtype',
                choices=['float32', 'float16'],
                default='float32',
                help='of weights and features; images are float32 (default: float32)',
            )
        command.add_argument('--param-key', help='state dict in the checkpoint (default: params_ema, else params)')
        command.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
        command.set_defaults(run=run)


def run_onnx(args):
    """Export to ONNX, and print what was measured."""
    from lora_sr.deploy.exports import export_onnx

    print(export_onnx(args.checkpoint, args.output, args.dtype, args.param_key, args.overwrite))
    print(f'wrote {args.output}')


def run_torchscript(args):
    """Export to TorchScript, and print what was measured."""
    from lora_sr.deploy.exports import export_torchscript

    print(export_torchscript(args.checkpoint, args.output, args.param_key, args.overwrite))
    print(f'wrote {args.output}')


def run_chainner(args):
    """Export for chaiNNer, and print what was measured."""
    from lora_sr.deploy.exports import export_chainner

    print(export_chainner(args.checkpoint, args.output, args.param_key, args.overwrite))
    print(f'wrote {args.output}')
