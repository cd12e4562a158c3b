"""Networks, their re-parameterisation, and loading them from a checkpoint alone."""

from lora_sr.archs.any_size import take_any_size
from lora_sr.archs.loading import load_network, read_state_dict
from lora_sr.archs.reparam import fold, is_training_form

__all__ = ['fold', 'is_training_form', 'load_network', 'read_state_dict', 'take_any_size']
