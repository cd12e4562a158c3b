"""Networks in plain torch, their re-parameterization, and what they take and cost."""

from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.archs.any_size import take_any_size
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN, LKDN_S
from lora_sr.archs.reparam import fold, is_training_form
from lora_sr.archs.span import SPAN

# What option files name by ``type``.
NETWORKS = {network.__name__: network for network in (AdaptSR, DSCLoRA, LKDN, LKDN_S, SPAN)}

__all__ = ['DSCLoRA', 'LKDN', 'LKDN_S', 'NETWORKS', 'SPAN', 'AdaptSR', 'fold', 'is_training_form', 'take_any_size']
