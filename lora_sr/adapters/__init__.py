"""LoRA for convolutional and linear layers: layers, configuration, verbs and adapter files.

Of other packages these modules import torch and safetensors only; they work on any network.
"""

from lora_sr.adapters.checkpoint import (
    describe_lora,
    infer_lora_config,
    is_lora_key,
    load_adapter,
    lora_state_dict,
    merge_state_dict,
    read_adapter,
    save_adapter,
)
from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.groups import GROUPS, layer_groups
from lora_sr.adapters.layers import AdaptedModule, LoRAConv2d, LoRALayer, LoRALinear
from lora_sr.adapters.verbs import (
    ParameterCount,
    adapted_modules,
    add_lora,
    count_parameters,
    lora_layers,
    mark_trainable,
    merge_lora,
    remove_lora,
    set_lora_scale,
)

__all__ = [
    'GROUPS',
    'AdaptedModule',
    'LoRAConfig',
    'LoRAConv2d',
    'LoRALayer',
    'LoRALinear',
    'ParameterCount',
    'adapted_modules',
    'add_lora',
    'count_parameters',
    'describe_lora',
    'infer_lora_config',
    'is_lora_key',
    'layer_groups',
    'load_adapter',
    'lora_layers',
    'lora_state_dict',
    'mark_trainable',
    'merge_lora',
    'merge_state_dict',
    'read_adapter',
    'remove_lora',
    'save_adapter',
    'set_lora_scale',
]
