"""``python -m lora_sr.train -opt FILE``: train a network as BasicSR does, in the current folder.

The arguments are those of BasicSR's ``train.py``; under torchrun, ``torchrun --nproc_per_node N -m lora_sr.train …``.
"""

from __future__ import annotations

import sys

from lora_sr.cli.main import run_pipeline

if __name__ == '__main__':
    sys.exit(run_pipeline(is_train=True))
