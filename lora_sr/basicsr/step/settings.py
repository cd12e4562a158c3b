"""What the section ``train`` says of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_sr.basicsr.options.schema import TRAIN
from lora_sr.errors import InputError

AMP = {'bf16': torch.bfloat16, 'fp16': torch.float16}
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


@dataclass(frozen=True)
class StepSettings:
    """How a step is run. By default, as the model has it.

    Args:
        amp: The dtype of automatic mixed precision in the networks; ``None`` for none. Losses stay in float32.
        compile: Arguments of ``torch.compile``, for the blocks of the networks; ``None`` for none.
        accumulate_iter: Batches of which the gradients of a step are the mean.
        clip_grad_norm: The largest norm of the gradients of each optimizer; ``None`` for any.
        checkpointing: Whether the blocks keep no activations for the backward pass, and compute them once more there.
        tf32: Whether products in float32 may round their factors to 10 bits on a GPU; ``None`` for torch's choice.
        graph: Whether the whole step is one CUDA graph.
    """

    amp: torch.dtype | None = None
    compile: Mapping[str, Any] | None = None
    accumulate_iter: int = 1
    clip_grad_norm: float | None = None
    checkpointing: bool = False
    tf32: bool | None = None
    graph: bool = False

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> StepSettings:
        """What a section ``train`` says.

        Raises:
            InputError: A value that the option file cannot have.
        """
        keys = {key: value for key, value in train.items() if key in cls.__dataclass_fields__ and value is not None}
        for key, value in keys.items():
            fault = TRAIN[key].kind.fault(f'train.{key}', value)
            if fault:
                raise InputError(fault)
        if 'amp' in keys:
            keys['amp'] = AMP[keys['amp']]
        if 'compile' in keys:
            keys['compile'] = compile_arguments(keys['compile'])
        return cls(**keys)


def compile_arguments(value: bool | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments of ``torch.compile`` for ``train.compile``. Patches have one size: nothing is left open."""
    if value is False:
        return None
    return {'dynamic': False, **({} if value is True else value)}


def memory_format(train: Mapping[str, Any]) -> torch.memory_format:
    """What ``train.memory_format`` says.

    Raises:
        InputError: It is none.
    """
    name = train.get('memory_format')
    fault = TRAIN['memory_format'].kind.fault('train.memory_format', name)
    if fault:
        raise InputError(fault)
    return MEMORY_FORMATS[name or 'contiguous']


def batches_per_step(train: Any) -> int:
    """How many batches of ``batch_size_per_gpu`` a step has."""
    return int(train.get('accumulate_iter') or 1) if isinstance(train, Mapping) else 1


STEP_KEYS = frozenset(StepSettings.__dataclass_fields__)
