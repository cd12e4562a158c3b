"""The lines of the log."""

from __future__ import annotations

import functools
from typing import Any

from lora_sr.basicsr.patches.tools import is_defective, patch


def patch_remaining_time() -> None:
    """``MessageLogger`` counts one iteration too few: in the last one -1 is left, an ETA of "-1 day, 23:59:55"."""
    from basicsr.utils.logger import MessageLogger

    original = MessageLogger.__init__
    if not is_defective(original, 'max_iters'):
        return

    @patch
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.max_iters += 1

    MessageLogger.__init__ = __init__
