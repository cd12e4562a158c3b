"""LoRA for convolutions, linear layers, embeddings and attention: layers, configuration, verbs and adapter files.

Of other packages these modules import torch and safetensors only; they work on any network.
"""

from lora_sr.adapters.adapter import (
    Adapter,
    adapter_for,
    apply_adapter,
    describe_misfit,
    extract_adapter,
    merge_adapter,
    mix_adapters,
)
from lora_sr.adapters.adapter_file import load_adapter, parse_adapter, read_adapter, save_adapter
from lora_sr.adapters.allocation import LayerImportance, allocate_ranks, base_weight, layer_importance
from lora_sr.adapters.checkpoint import (
    describe_lora,
    infer_lora_config,
    is_lora_key,
    lora_state_dict,
    merge_state_dict,
    only_lora,
    without_lora,
)
from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.foreign import ForeignAdapter
from lora_sr.adapters.groups import GROUPS, layer_groups
from lora_sr.adapters.layers import (
    AdaptedModule,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRAConvTranspose2d,
    LoRAConvTranspose3d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMultiheadAttention,
    delta_kind,
)
from lora_sr.adapters.peft_layout import peft_layout
from lora_sr.adapters.verbs import (
    LeftAlone,
    ParameterCount,
    adapted_modules,
    add_lora,
    count_parameters,
    left_alone,
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
    'ForeignAdapter',
    'LayerImportance',
    'LeftAlone',
    'LoRAConfig',
    'LoRAConv1d',
    'LoRAConv2d',
    'LoRAConv3d',
    'LoRAConvTranspose1d',
    'LoRAConvTranspose2d',
    'LoRAConvTranspose3d',
    'LoRAEmbedding',
    'LoRALayer',
    'LoRALinear',
    'LoRAMultiheadAttention',
    'ParameterCount',
    'adapted_modules',
    'adapter_for',
    'add_lora',
    'allocate_ranks',
    'apply_adapter',
    'base_weight',
    'count_parameters',
    'delta_kind',
    'describe_lora',
    'describe_misfit',
    'extract_adapter',
    'infer_lora_config',
    'is_lora_key',
    'layer_groups',
    'layer_importance',
    'left_alone',
    'load_adapter',
    'lora_layers',
    'lora_state_dict',
    'mark_trainable',
    'merge_adapter',
    'merge_lora',
    'merge_state_dict',
    'mix_adapters',
    'only_lora',
    'parse_adapter',
    'peft_layout',
    'read_adapter',
    'remove_lora',
    'save_adapter',
    'set_lora_scale',
    'without_lora',
]
