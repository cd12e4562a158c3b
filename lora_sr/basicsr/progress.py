"""A bar on a terminal that shows how far a run is; its log is written above it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

if TYPE_CHECKING:
    from lora_sr.basicsr.samples import SampleStream

_bars: dict[int, tuple[Any, contextlib.ExitStack]] = {}  # of the run of this process, if it has one


def show(opt: Mapping[str, Any], stream: SampleStream, done: int) -> None:
    """Show that so many iterations have been done, if whoever started the run sees it on a terminal."""
    if opt['rank'] != 0 or not sys.stderr.isatty():
        return
    if id(stream) not in _bars:
        close()
        stack = contextlib.ExitStack()
        # BasicSR's lines would break the bar: they go through it.
        stack.enter_context(logging_redirect_tqdm([logging.getLogger('basicsr')]))
        bar = tqdm(total=stream.total_iter, initial=done, unit='it', desc=opt['name'], dynamic_ncols=True)
        stack.callback(bar.close)
        _bars[id(stream)] = bar, stack
    bar, _ = _bars[id(stream)]
    bar.update(done - bar.n)


def close() -> None:
    """Leave the bar as it stands."""
    while _bars:
        _bars.popitem()[1][1].close()
