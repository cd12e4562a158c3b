"""What this package adds to BasicSR's registries."""

from __future__ import annotations

import logging
import multiprocessing
import os

LOG = logging.getLogger('basicsr')  # BasicSR's: what is logged once a run has begun goes to its file as well
SUFFIX = 'lora_sr'  # behind a name that a clone of BasicSR has given to something of its own


def register_all() -> None:
    """Register every network, loss, dataset, metric, model and optimizer. May be called again.

    Where BasicSR, i.e. a clone that somebody has extended, has a class of that name already, it keeps the name, and
    ours is registered as ``NAME_lora_sr``. One warning names them all.
    """
    from basicsr.utils import registry

    from lora_sr.archs.registry import OWN
    from lora_sr.basicsr import datasets, metrics, models, raw_datasets
    from lora_sr.basicsr.patches.optimizers import optimizer_registry
    from lora_sr.checkpoints.building import DESCRIBED
    from lora_sr.losses import PSNRLoss, SpatialAffinityLoss
    from lora_sr.optim import Adan

    taken = []
    for target, entries in (
        (registry.ARCH_REGISTRY, (*OWN.values(), *DESCRIBED.values())),
        (registry.LOSS_REGISTRY, (PSNRLoss, SpatialAffinityLoss)),
        (
            registry.DATASET_REGISTRY,
            (datasets.LRImageDataset, raw_datasets.RawPairedImageDataset, raw_datasets.RawLRImageDataset),
        ),
        (registry.METRIC_REGISTRY, (metrics.calculate_lpips, metrics.calculate_dists)),
        (registry.MODEL_REGISTRY, (models.DistillationModel,)),
        (optimizer_registry(), (Adan,)),
    ):
        known = dict(iter(target))
        for entry in entries:
            if entry in known.values():
                continue
            if entry.__name__ in known:
                target._do_register(f'{entry.__name__}_{SUFFIX}', entry)
                taken.append(entry.__name__)
            else:
                target.register(entry)
    # Data-loader workers and the other processes of a machine would only say the same again.
    if taken and multiprocessing.parent_process() is None and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        ours = ', '.join(f'{name}_{SUFFIX}' for name in taken)
        LOG.warning('BasicSR has its own %s. The ones of lora_sr are registered as %s.', ', '.join(taken), ours)
