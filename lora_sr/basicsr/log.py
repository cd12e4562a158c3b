"""The log of this package in a run of BasicSR's."""

from __future__ import annotations

import logging

LOG = logging.getLogger('basicsr')


def join_logs() -> None:
    """Let what this package logs go where BasicSR's log goes: in a run, to the console and to its file."""
    ours = logging.getLogger('lora_sr')
    ours.parent = LOG
    if not any(isinstance(one, _Once) for one in ours.filters):
        ours.addFilter(_Once())


def start_log() -> None:
    """Say everything anew: a run begins."""
    for one in logging.getLogger('lora_sr').filters:
        if isinstance(one, _Once):
            one.seen.clear()


class _Once(logging.Filter):
    """Lets each message through once from where a run has set up its log: a run builds a network several times."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not LOG.handlers:
            return True
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new
