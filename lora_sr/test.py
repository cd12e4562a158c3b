"""``python -m lora_sr.test -opt FILE``: run a network on test sets as BasicSR does, in the current folder.

The arguments are those of BasicSR's ``test.py``.
"""

from __future__ import annotations

import sys

from lora_sr.cli.main import run_pipeline

if __name__ == '__main__':
    sys.exit(run_pipeline(is_train=False))
