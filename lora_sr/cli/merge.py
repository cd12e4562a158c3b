"""`lora-sr merge`: a training checkpoint to its deploy form."""


def add_parser(commands):
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'merge',
        help='merge LoRA and fold branches into a plain checkpoint',
        description='Take a training checkpoint to a plain checkpoint of the stock network: merge its LoRA, then fold '
        'its re-parameterised branches, whichever it has, and check that both give the same images.',
    )
    parser.add_argument('checkpoint', help='checkpoint with LoRA or branches (.pth or .safetensors)')
    parser.add_argument('-o', '--output', required=True, help='file to write (.pth or .safetensors)')
    parser.add_argument('--param-key', help='state dict in the checkpoint (default: params_ema, else params)')
    parser.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
    parser.set_defaults(run=run)


def run(args):
    """Merge and fold, and print what was measured."""
    from lora_sr.deploy.merge import merge_checkpoint

    print(merge_checkpoint(args.checkpoint, args.output, args.param_key, args.overwrite))
    print(f'wrote {args.output}')
