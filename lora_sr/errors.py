"""What ends a command with a sentence instead of a traceback."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable

LONGEST_NAME = 256  # of a file
LONG_WORD = re.compile(rf'\S{{{LONGEST_NAME + 1},}}')


class InputError(ValueError):
    """Wrong input: an option, a path, a checkpoint or a dataset that cannot be used.

    Its message is one sentence for the user that names the key or the file, its value, and what would be right.
    The command line prints it without a traceback and exits with status 2.
    """


class DivergenceError(ArithmeticError):
    """A training whose losses or weights are no longer finite.

    Its message says where, and from what the run can go on. The command line prints it without a traceback and exits
    with status 1.
    """


def printable(text: str) -> str:
    """What somebody else has written, with its line breaks and control characters escaped."""
    return text if text.isprintable() else ''.join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def shown(text: str, most: int = 80) -> str:
    """What somebody else has written, for a message: printable, and cut in its middle to ``most`` letters before."""
    return printable(text if len(text) <= most else f'{text[: most - 20]}…{text[-19:]}')


def in_a_line(error: BaseException, most: int = 80) -> str:
    """What an error of somebody else's code says, in one line for a message, as :func:`shown` gives it."""
    return shown(' '.join(str(error).split()), most)


def sentences(message: str, given: Iterable[str]) -> str:
    """A message of a sentence a line, without what a name would make a line or a color of its own, or far too long.

    Args:
        message: Its lines are its sentences, but where something that was given has line breaks.
        given: The arguments of the command line.
    """
    for argument in given:
        for name in (argument, argument.partition('=')[2], *re.split('[=,:/]', argument)):
            if (not name.isprintable() or len(name) > LONGEST_NAME) and name in message:
                message = message.replace(name, printable(name) if len(name) <= LONGEST_NAME else shown(name))
    lines = (printable(line) for line in message.split('\n'))
    return '\n'.join(LONG_WORD.sub(lambda word: shown(word[0]), line) for line in lines)


def is_first_process() -> bool:
    """Whether this is the first process of a run on its machine, which tells what is wrong."""
    return os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', '')) in ('', '0')


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of the message about an unknown name: the nearest known ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    return f'did you mean {" or ".join(near)}?' if near else f'known are {", ".join(known)}'


class MissingBasicSR(InputError):
    """Something needs BasicSR, which is not installed."""


def import_basicsr(needed_by: str) -> None:
    """Import BasicSR, and so plug into it.

    Args:
        needed_by: What needs it, for the message.

    Raises:
        MissingBasicSR: It is not installed.
    """
    try:
        # A folder of that name is imported as well, as a package without a file of its own.
        if getattr(importlib.import_module('basicsr'), '__file__', None) is not None:
            return
    except ModuleNotFoundError as error:
        if error.name != 'basicsr':
            raise
    remedy = 'pip install basicsr'
    if sys.version_info >= (3, 13):
        version = '.'.join(map(str, sys.version_info[:2]))
        remedy = f'it does not install on Python 3.13 and later, and this is {version}; use Python 3.9 to 3.12'
    raise MissingBasicSR(f'{needed_by} needs BasicSR, which is not installed: {remedy}.')
