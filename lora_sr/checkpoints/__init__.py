"""Checkpoint files: reading them, and the networks that they belong to."""

from lora_sr.checkpoints.loading import load_network, read_state_dict

__all__ = ['load_network', 'read_state_dict']
