"""`lora-sr inspect`: the layers of a network, what adapts them, and what that costs."""


def add_parser(commands):
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'inspect',
        help='table of the layers of a network and of their LoRA',
        description='Show the layers of a network, the group and the rank of each, and what share of the parameters '
        'trains. Of an option file this is network_g as the run would build it, and neither data nor weights are '
        'needed. Equal layers of repeated blocks share a line, which has their sums.',
    )
    parser.add_argument('file', metavar='FILE', help='option file (.yml) or checkpoint (.pth, .safetensors)')
    parser.add_argument('--all', action='store_true', help='a line for every layer')
    parser.set_defaults(run=run)


def run(args):
    """Print the table."""
    from lora_sr.evaluation.inspection import format_inspection, inspect_network, read_network

    print(format_inspection(inspect_network(read_network(args.file)), fold=not args.all))
