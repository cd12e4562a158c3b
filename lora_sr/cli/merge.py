"""`lora-sr merge`: an adapted checkpoint to a plain one."""


def add_parser(commands):
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'merge',
        help='merge the LoRA of a checkpoint into a plain one',
        description='Merge the LoRA of an adapted checkpoint into a plain checkpoint of the '
        'stock network, and check that both give the same images.',
    )
    parser.add_argument('checkpoint', help='adapted checkpoint (.pth or .safetensors)')
    parser.add_argument('-o', '--output', required=True, help='file to write (.pth or .safetensors)')
    parser.add_argument('--param-key', help='state dict in the checkpoint (default: params_ema, else params)')
    parser.add_argument('--overwrite', action='store_true', help='replace the output where it exists')
    parser.set_defaults(run=run)


def run(args):
    """Merge, and print what was measured."""
    from lora_sr.deploy.merge import merge_checkpoint

    print(merge_checkpoint(args.checkpoint, args.output, args.param_key, args.overwrite))
    print(f'wrote {args.output}')
