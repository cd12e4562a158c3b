"""The check of what the section `train` says of the step: precision, compilation, memory."""

from __future__ import annotations

from typing import Any

import torch

from lora_sr.archs.layout import repeated_blocks
from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import Check
from lora_sr.errors import did_you_mean, in_a_line

DATA_PARALLEL_REFUSED = (
    'train.amp, compile, accumulate_iter, checkpointing and graph need a process for each GPU: start the run by '
    'torchrun, or set num_gpu: 1.'
)
RECORDING_MODES = ('reduce-overhead', 'max-autotune')  # of torch.compile, by CUDA graphs of its own
OF_PROCESSES = ('amp', 'compile', 'checkpointing', 'graph')


def no_blocks(where: str, kind: str) -> str:
    """Why the activations of a network are kept."""
    return f'train.checkpointing must be false for {where}: {kind} is not made of blocks that repeat.'


def check_step(check: Check, train: dict) -> None:
    """Check the keys of the step, of which the schema has the kinds."""
    gpus: Any = check.opt.get('num_gpu')
    gpus = torch.cuda.device_count() if gpus == 'auto' else gpus
    parts = train.get('accumulate_iter') or 1
    if check.processes == 1 and schema.is_number(gpus) and gpus > 1:
        if parts != 1 or any(train.get(key) for key in OF_PROCESSES):
            check.add(DATA_PARALLEL_REFUSED)
    if check.opt.get('model_type') == schema.STYLE and parts != 1:
        check.add(
            f'train.accumulate_iter must be 1 for {schema.STYLE}, which steps more than once in an iteration, got '
            f'{parts}.'
        )
    network = check.networks.get('network_g')
    if train.get('checkpointing') is True and network is not None and not repeated_blocks(network):
        check.add(no_blocks('network_g', type(network).__name__))
    if train.get('amp') == 'bf16' and gpus != 0 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        check.add(f'train.amp must be fp16 on {torch.cuda.get_device_name()}, got bf16.')
    if isinstance(train.get('compile'), dict):
        _check_compile(check, train['compile'])
        mode = train['compile'].get('mode')
        if train.get('graph') and mode in RECORDING_MODES:
            check.add(f'train.graph must be false with train.compile.mode {mode}, which records by itself.')


def _check_compile(check: Check, section: dict) -> None:
    where = 'train.compile'
    if not check.arguments(where, torch.compile, section, supplied=('model',)):
        return
    backend, mode = section.get('backend', 'inductor'), section.get('mode')
    backends = torch._dynamo.list_backends(exclude_tags=())
    before = len(check.problems)
    if backend not in backends:
        check.add(f"{where}.backend: there is no '{backend}'; {did_you_mean(str(backend), backends)}")
    if mode is not None:
        check.value(f'{where}.mode', mode, schema.one_of(*torch._inductor.list_mode_options()))
    if len(check.problems) == before:
        try:
            torch.compile(torch.nn.Identity(), **section)  # which looks at the rest; nothing is compiled yet
        except Exception as error:  # whatever a backend says of its options
            check.add(f'{where} does not suit torch.compile: {in_a_line(error)}')
