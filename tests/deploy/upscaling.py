"""`lora-sr upscale`, run in this process."""

import argparse

from lora_sr.cli import upscale as command
from lora_sr.errors import InputError


def run(*arguments) -> int:
    """The command by itself; its exit status as `lora-sr` gives it."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(['upscale', *map(str, arguments)])
    try:
        args.run(args)
    except InputError:
        return 2
    except SystemExit as error:
        return error.code
    return 0


def files_in(folder) -> list:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


# Files
