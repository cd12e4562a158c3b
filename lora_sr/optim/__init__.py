"""Optimizers that neither torch nor BasicSR has. They work on any network, and import nothing of BasicSR."""

from lora_sr.optim.adan import Adan

__all__ = ['Adan']
