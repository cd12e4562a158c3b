"""Parameter-efficient fine-tuning and distillation for super-resolution, as a plug-in for BasicSR.

Importing this package mends what is defective in BasicSR, and registers every network, loss, data set, model and
optimizer.
"""

import importlib
from pathlib import Path

from lora_sr import basicsr_compat, optim

basicsr_compat.apply()
basicsr_compat.OPTIMIZER_REGISTRY.register(optim.Adan)  # here, since `optim` knows nothing of BasicSR

# BasicSR's habit: whatever registers something is found by the suffix of its file.
for _pattern in (
    'archs/*_arch.py',
    'losses/*_loss.py',
    'data/*_dataset.py',
    'metrics/*_metric.py',
    'models/*_model.py',
):
    for _file in sorted(Path(__file__).parent.glob(_pattern)):
        importlib.import_module(f'{__name__}.{_file.parent.name}.{_file.stem}')

from lora_sr.archs import load_network  # noqa: E402  (BasicSR has to be mended before)
from lora_sr.deploy.runtime import optimize  # noqa: E402

__all__ = ['load_network', 'optimize']
__version__ = '0.1.0'
