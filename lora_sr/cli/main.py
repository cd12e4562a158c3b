"""``lora-sr``: one command, a sub-command for each step of the work."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Callable, NoReturn

from lora_sr import threads
from lora_sr.errors import InputError, import_basicsr, is_first_process, printable, sentences, shown

if TYPE_CHECKING:
    from types import FrameType

PREPARING, TRAINING = ('prepare', 'degrade'), ('adapt', 'inspect', 'allocate', 'pipelines')
DEPLOYING = ('merge', 'adapter', 'upscale', 'export', 'submission')
MEASURING = ('compare', 'attribution', 'curves', 'report', 'bench')
NEED_BASICSR = ('adapt', 'train', 'test', 'allocate')
# `bench` measures what it is given.
COMPUTING = (*NEED_BASICSR, 'degrade', 'upscale', 'compare', 'attribution', 'report')


class _Parser(argparse.ArgumentParser):
    """A parser that repeats what is wrong as part of its own line; sub-commands have one of the same class."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        super().error(sentences(printable(message), self.given))

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self.given = [repr(word)[1:-1] for word in (sys.argv[1:] if args is None else args)]  # as they are told
        for word in sys.argv[1:] if args is None else args:
            if re.fullmatch('--[^=]+=--', word):  # of which argparse makes an empty list before Python 3.13
                self.error(f'argument {word[:-3]}: expected one argument')
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``lora-sr``; each sub-command sets ``run``, a function of the parsed arguments."""
    parser = _Parser(prog='lora-sr', description='LoRA and distillation for SR, on BasicSR.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name in (*PREPARING, *TRAINING, *DEPLOYING, *MEASURING):
        importlib.import_module(f'lora_sr.cli.{name}').add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run ``lora-sr``.

    Returns:
        The exit status: 0; 2 after a mistake in the input, told in one sentence a line; 1 where some of the work
        failed, as a training that diverged; 130 after Ctrl-C; 141 where whoever reads the output has left.
    """

    def run() -> None:
        args = build_parser().parse_args(argv)
        if args.command in COMPUTING:
            threads.leave_room()
        if args.command in NEED_BASICSR:
            import_basicsr(f'lora-sr {args.command}')
        args.run(args)

    return _tell(run, 'lora-sr: ', argv=argv)


def run_pipeline(is_train: bool) -> int:
    """Run ``python -m lora_sr.train`` or ``lora_sr.test``. Returns the exit status, as ``main`` does."""

    def run() -> int:
        threads.leave_room()
        import_basicsr(f'lora_sr.{"train" if is_train else "test"}')
        from lora_sr.cli import pipelines

        return pipelines.main(is_train)

    # Of several processes on a machine, the first tells what is wrong.
    return _tell(run, '', is_quiet=not is_first_process())


def _tell(run: Callable[[], int | None], prefix: str, is_quiet: bool = False, argv: Sequence[str] | None = None) -> int:
    """Run something, its imports included, and turn what stops it into a line and an exit status."""
    for name in ('stdout', 'stderr'):  # None where they were closed before Python began
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # a file may have a name that is no text
    os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')  # before it is imported: images that it cannot read are named
    with _noted_interrupts() as interrupts, warnings.catch_warnings():
        # Of SwinIR's calls, and of networks whose layers have no channels, which are told where that matters.
        warnings.filterwarnings('ignore', 'torch.meshgrid|Initializing zero-element', UserWarning)
        warnings.filterwarnings('ignore', module='PIL')  # of images that are read all the same, or named
        warnings.filterwarnings('ignore', 'Glyph .* missing', UserWarning)  # of names in figures
        try:
            _check_current_folder()  # before torch is imported, which ends the process where there is none
            return run() or 0
        except InputError as error:
            message, status = f'error: {sentences(str(error), sys.argv[1:] if argv is None else argv)}', 2
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                message, status = f'error: there is no name as long as {shown(str(error.filename))}', 2
            elif error.strerror is not None and _was_given(error.filename, sys.argv[1:] if argv is None else argv):
                message, status = f'error: {shown(str(error.filename), 256)} cannot be used: {error.strerror}', 2
            elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # of the standard output
                message, status = f'error: the output cannot be written: {error.strerror}', 2
            else:
                raise
        except BaseException as error:
            # NumPy and torch turn Ctrl-C into an ImportError where it meets their first lines.
            if not (isinstance(error, KeyboardInterrupt) or (interrupts and isinstance(error, Exception))):
                raise
            message, status = 'interrupted', 130
    if not is_quiet:
        print(f'{prefix}{message}', file=sys.stderr, flush=True)
    return status


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError('the current folder must exist, got one that has been removed') from None


def _was_given(path: object, given: Sequence[str]) -> bool:
    """Whether a path was an argument of the command line, or is below one: any other is no matter of the user's."""
    if not isinstance(path, str):
        return False
    roots = [os.path.abspath(word) for argument in given for word in (argument, argument.partition('=')[2]) if word]
    return any(os.path.abspath(path) == root or os.path.abspath(path).startswith(f'{root}{os.sep}') for root in roots)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """A list that grows with each Ctrl-C, which still raises KeyboardInterrupt."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == '__main__':
    sys.exit(main())
