"""Files of weights, and the one way from what a user names to a network."""

from lora_sr.checkpoints.adapter_file import AdapterFile
from lora_sr.checkpoints.checkpoint import Checkpoint
from lora_sr.checkpoints.networks import NetworkLike, NetworkSource, OpenedNetwork, load_network, open_network
from lora_sr.checkpoints.origin import Origin

__all__ = [
    'AdapterFile',
    'Checkpoint',
    'NetworkLike',
    'NetworkSource',
    'OpenedNetwork',
    'Origin',
    'load_network',
    'open_network',
]
