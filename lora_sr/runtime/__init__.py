"""Deployed networks, as fast as the hardware allows."""

from lora_sr.runtime.deployed import DeployedNetwork, optimize
from lora_sr.runtime.upscaler import Upscaler, upscale_image

__all__ = ['DeployedNetwork', 'Upscaler', 'optimize', 'upscale_image']
