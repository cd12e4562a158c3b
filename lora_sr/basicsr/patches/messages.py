"""The lines of the log."""

from __future__ import annotations

import functools
from typing import Any

from lora_sr.basicsr.patches.tools import is_defective, patch
from lora_sr.basicsr.samples import stream_of


def patch_message_logger() -> None:
    """``MessageLogger`` counts one iteration too few: in the last one -1 is left, an ETA of "-1 day, 23:59:55".

    Nothing else is handed the writer of TensorBoard together with the options of its run.
    """
    from basicsr.utils.logger import MessageLogger

    original = MessageLogger.__init__
    if not is_defective(original, 'max_iters'):
        return

    @patch
    @functools.wraps(original)
    def __init__(self: Any, opt: dict[str, Any], start_iter: int = 1, tb_logger: Any = None) -> None:
        original(self, opt, start_iter, tb_logger)
        self.max_iters += 1
        stream = stream_of(opt)
        if stream is not None:
            stream.tb_logger = tb_logger

    MessageLogger.__init__ = __init__
