"""The bar of a run: on a terminal alone, and its log stands above it whole."""

import contextlib
import fcntl
import logging
import os
import pty
import select
import struct
import sys
import termios
from types import SimpleNamespace

from lora_sr.basicsr import progress

OPT = {'rank': 0, 'name': 'SPAN'}


def read(descriptor):
    shown = b''
    while select.select([descriptor], [], [], 0.5)[0]:
        shown += os.read(descriptor, 1 << 16)
    return shown.decode()


@contextlib.contextmanager
def terminal():
    """Where the standard error is a terminal: a function that gives what has been shown there."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    with os.fdopen(writer, 'w') as stream, contextlib.redirect_stderr(stream):
        yield lambda: read(reader)
        progress.close()
    os.close(reader)


def test_a_bar_with_the_log_above_it(monkeypatch):
    logger, stream = logging.getLogger('basicsr'), SimpleNamespace(total_iter=40)
    with terminal() as shown_so_far:
        handler = logging.StreamHandler(sys.stderr)
        monkeypatch.setattr(logger, 'handlers', [handler])
        progress.show(OPT, stream, 10)
        logger.warning('a line')
        progress.show(OPT, stream, 20)
        progress.close()
        assert logger.handlers == [handler]
        shown = shown_so_far()
    assert 'SPAN:  25%' in shown and '10/40' in shown  # a run that went on from its tenth iteration
    assert 'a line' in shown.replace('\r', '\n').splitlines()
    assert '20/40' in shown.rpartition('\r')[0] and shown.endswith('\r\n')


def test_no_bar_of_another_process():
    with terminal() as shown_so_far:
        progress.show({**OPT, 'rank': 1}, SimpleNamespace(total_iter=40), 0)
        print('.', end='', file=sys.stderr, flush=True)
        assert shown_so_far() == '.'


def test_no_bar_elsewhere(capsys):
    progress.show(OPT, SimpleNamespace(total_iter=40), 0)
    progress.close()
    assert capsys.readouterr() == ('', '')
