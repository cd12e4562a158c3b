"""What this package adds to BasicSR's registries."""

from __future__ import annotations

import logging

LOG = logging.getLogger('basicsr')
SUFFIX = 'lora_sr'  # behind a name that a clone of BasicSR has given to something of its own


def register_all() -> None:
    """Register every network, loss, dataset, metric, model and optimizer. May be called again.

    Where BasicSR, i.e. a clone that somebody has extended, has a class of that name already, it keeps the name, and
    ours is registered as ``NAME_lora_sr``.
    """
    from basicsr.utils import registry

    from lora_sr.archs import NETWORKS
    from lora_sr.basicsr import datasets, metrics, models
    from lora_sr.basicsr.patches.optimizers import optimizer_registry
    from lora_sr.losses import PSNRLoss, SpatialAffinityLoss
    from lora_sr.optim import Adan

    for target, entries in (
        (registry.ARCH_REGISTRY, tuple(NETWORKS.values())),
        (registry.LOSS_REGISTRY, (PSNRLoss, SpatialAffinityLoss)),
        (registry.DATASET_REGISTRY, (datasets.LRImageDataset,)),
        (registry.METRIC_REGISTRY, (metrics.calculate_lpips, metrics.calculate_dists)),
        (registry.MODEL_REGISTRY, (models.DistillationModel,)),
        (optimizer_registry(), (Adan,)),
    ):
        known = dict(iter(target))
        for entry in entries:
            name = entry.__name__
            if entry in known.values():
                continue
            if name in known:
                LOG.warning(f'BasicSR has its own {name}; that of lora_sr is registered as {name}_{SUFFIX}.')
                target._do_register(f'{name}_{SUFFIX}', entry)
            else:
                target.register(entry)
