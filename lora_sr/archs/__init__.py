"""Networks in plain torch, their reparameterization, and what they take, give and cost."""

from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.archs.disp import DISP
from lora_sr.archs.dscf_fused import DSCFFused
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.info import NetworkInfo, network_info, take_any_size
from lora_sr.archs.lkdn import LKDN, LKDN_S
from lora_sr.archs.reparam import deploy_form, fold, is_training_form
from lora_sr.archs.span import SPAN
from lora_sr.archs.spanf import SPANF
from lora_sr.archs.spanv2 import SPANV2

__all__ = [
    'DISP',
    'DSCFFused',
    'DSCLoRA',
    'LKDN',
    'LKDN_S',
    'SPAN',
    'SPANF',
    'SPANV2',
    'AdaptSR',
    'NetworkInfo',
    'deploy_form',
    'fold',
    'is_training_form',
    'network_info',
    'take_any_size',
]
