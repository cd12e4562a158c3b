"""Losses of images and of features."""

from lora_sr.losses.affinity import SpatialAffinityLoss
from lora_sr.losses.psnr import PSNRLoss

__all__ = ['PSNRLoss', 'SpatialAffinityLoss']
