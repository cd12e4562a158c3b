"""Arguments that several sub-commands take."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_sr.errors import InputError, printable

if TYPE_CHECKING:
    from lora_sr.checkpoints import NetworkSource, OpenedNetwork

CHECKPOINT = 'checkpoint (.pth or .safetensors) in any form; without it the one that the option file of -opt names'


def named(path: str) -> Callable[[str], tuple[str, str]]:
    """A type for argparse: ``NAME=path`` to (name, path). ``path`` says what the path is, e.g. ``FOLDER``."""

    def parse(argument: str) -> tuple[str, str]:
        name, equals, value = argument.partition('=')
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f'{argument!r} should be NAME={path}')
        return name, value

    return parse


def by_name(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The pairs that :func:`named` gave, as name -> path.

    Raises:
        InputError: A name is given twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f'The name "{name}" is given {names.count(name)} times: give each its own.')
    return dict(pairs)


def weighted(argument: str) -> tuple[str, float | None]:
    """A type for argparse: ``FILE`` or ``FILE=WEIGHT`` to (path, weight or None)."""
    path, equals, text = argument.rpartition('=')
    if not equals or os.path.exists(argument):
        return argument, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f'{argument!r} should be FILE or FILE=WEIGHT, with a number for WEIGHT')
    return path, weight


def add_network_options(parser: argparse.ArgumentParser, with_adapters: bool = True) -> None:
    """Add what makes a network of a checkpoint; :func:`network_source` reads it."""
    group = parser.add_argument_group('network', 'What makes a network of a checkpoint, if more is needed.')
    group.add_argument('-opt', dest='options', metavar='FILE', help='option file whose network_g the checkpoint is of')
    group.add_argument(
        '--import',
        dest='imports',
        action='append',
        default=[],
        metavar='MODULE',
        help='module, or .py file, that registers a network of your own; may be repeated',
    )
    group.add_argument(
        '--param-key', metavar='KEY', help='state dict in the file, a.b within sections (default: found, EMA first)'
    )
    if with_adapters:
        group.add_argument(
            '--adapter',
            dest='adapters',
            action='append',
            default=[],
            type=weighted,
            metavar='FILE[=WEIGHT]',
            help='adapter to put on top, also of PEFT or kohya (default weight: 1); may be repeated',
        )
    add_force(group)


def add_force(parser: argparse._ActionsContainer) -> None:
    """Add ``--force``."""
    parser.add_argument(
        '--force', action='store_true', help='put an adapter on another base than its own, or twice on one'
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Add ``--share``; :func:`lora_sr.share.own_share` reads it."""
    parser.add_argument(
        '--share',
        action='store_true',
        help='share the images with the other processes of torchrun, of srun or of a job array of slurm',
    )


def tell_written(path: str | os.PathLike[str]) -> None:
    """Print the name of a file that a command has written."""
    print(f'wrote {printable(os.fspath(path))}')


def network_source(args: argparse.Namespace, checkpoint: str | None) -> NetworkSource:
    """What the arguments of :func:`add_network_options` name, with a checkpoint."""
    from lora_sr.checkpoints import NetworkSource

    adapters = [(path, 1.0 if weight is None else weight) for path, weight in getattr(args, 'adapters', [])]
    return NetworkSource(checkpoint, args.options, args.imports, adapters, args.param_key, args.force)


def named_networks(args: argparse.Namespace) -> Mapping[str, NetworkSource | OpenedNetwork]:
    """The networks of a command that takes several: ``args.networks``, name -> file, and :func:`add_network_options`.

    The option file of ``-opt`` serves those whose network it is; every other file tells its own.

    Raises:
        InputError: A name is given twice, or what is wrong with the option file.
    """
    from lora_sr.option_file import load_options

    files = by_name(args.networks)
    if args.options is not None:
        load_options(args.options)  # what is wrong with it must not look like a file that it does not fit
    return {name: _named_network(args, file) for name, file in files.items()}


def _named_network(args: argparse.Namespace, file: str) -> NetworkSource | OpenedNetwork:
    """A network by the option file of ``-opt`` where that fits, else as the file itself tells."""
    from lora_sr.checkpoints import Checkpoint, open_network

    source = network_source(args, file)
    if args.options is None or file.endswith(('.yml', '.yaml')):
        return replace(source, options=None)
    source = replace(source, checkpoint=Checkpoint.read(file, args.param_key), param_key=None)
    try:
        return open_network(source)
    except InputError as error:
        try:
            return open_network(replace(source, options=None))
        except InputError:
            raise error from None
