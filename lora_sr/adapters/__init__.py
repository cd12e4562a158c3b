"""LoRA for convolutional and linear layers: layers, configuration, verbs and adapter files.

Of other packages these modules import torch and safetensors only; they work on any network.
"""

from lora_sr.adapters.adapter_file import (
    Adapter,
    apply_adapter,
    describe_misfit,
    extract_adapter,
    load_adapter,
    merge_adapter,
    mix_adapters,
    parse_adapter,
    read_adapter,
    save_adapter,
)
from lora_sr.adapters.allocation import LayerImportance, allocate_ranks, layer_importance
from lora_sr.adapters.checkpoint import (
    describe_lora,
    infer_lora_config,
    is_lora_key,
    lora_state_dict,
    merge_state_dict,
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
    'Adapter',
    'LayerImportance',
    'LoRAConfig',
    'LoRAConv2d',
    'LoRALayer',
    'LoRALinear',
    'ParameterCount',
    'adapted_modules',
    'add_lora',
    'allocate_ranks',
    'apply_adapter',
    'count_parameters',
    'describe_lora',
    'describe_misfit',
    'extract_adapter',
    'infer_lora_config',
    'is_lora_key',
    'layer_groups',
    'layer_importance',
    'load_adapter',
    'lora_layers',
    'lora_state_dict',
    'mark_trainable',
    'merge_adapter',
    'merge_lora',
    'merge_state_dict',
    'mix_adapters',
    'parse_adapter',
    'read_adapter',
    'remove_lora',
    'save_adapter',
    'set_lora_scale',
]
