"""What a file of weights may hold, so that a damaged or hostile one ends in a sentence and not in the memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from lora_sr.adapters.checkpoint import LONGEST_NAME
from lora_sr.errors import InputError, shown

# Tied weights have several names, and a view may repeat values: what a file holds stands for so many times as much.
LARGEST_REPEAT = 16
SMALL_BYTES = 2**27  # merging makes several copies of each
FEW_VALUES, FEW_TENSORS = 10**6, 1000
LARGEST_DIGITS = 9
LARGEST_STATE = 10_000  # torch looks through those of a module again for each part of it
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(getattr(torch, name) for name in ('float8_e4m3fn', 'float8_e5m2') if hasattr(torch, name)),  # since torch 2.1
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)
_LIMITING = threading.RLock()  # one limit at a time, so that each finds the one before it


def check_content(content: Mapping[Any, Any], path: object, size: int) -> None:
    """Check what a file holds, before anything is made of it: names, and the tensors of its state dicts.

    Args:
        content: What it holds.
        path: The file, for messages.
        size: How many bytes it has.

    Raises:
        InputError: A name is no text, too long or not printable; or a tensor has a layout or a type that weights have
            not, or claims many times the values that are in the file.
    """
    _check_names(content, path)
    sections: list[tuple[int, Mapping[Any, Any]]] = [(0, content)]
    seen = {id(content)}
    for depth, section in sections:  # which grow
        tensors = {key: value for key, value in section.items() if isinstance(value, Tensor)}
        # Further within, the parameters of an optimizer have numbers.
        if tensors and (depth <= 1 or all(isinstance(key, str) for key in section)):
            _check_names(section, path)
            _check_tensors(tensors, path, size)
        inner = [value for value in section.values() if isinstance(value, Mapping) and id(value) not in seen]
        seen.update(map(id, inner))
        sections += [(depth + 1, value) for value in inner]


def check_plain(content: object, path: object) -> None:
    """Check that no section of a file has attributes of its own: a pickle may put some in the place of its methods.

    Raises:
        InputError: One has, beside what a state dict keeps of the versions of its modules.
    """
    seen: set[int] = set()
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, Tensor) and any(hasattr(Tensor, name) for name in vars(value)):
            raise InputError(f'the checkpoint {path} must hold tensors as they are, got one with methods of its own')
        if not isinstance(value, (dict, list, tuple, set)) or id(value) in seen:
            continue
        seen.add(id(value))
        attributes = getattr(value, '__dict__', {})
        own = sorted(name for name in map(str, attributes) if hasattr(type(value), name))
        for name in attributes.keys() - {'_metadata', *own}:  # of a class of the trainer's own, which is not read
            del attributes[name]
        if own:
            raise InputError(
                f'the checkpoint {path} must hold tensors and plain values alone, got a section with the attribute '
                f'{shown(own[0])}'
            )
        values += dict.values(value) if isinstance(value, dict) else value


def _check_names(values: Mapping[Any, Any], path: object) -> None:
    for name in values:
        if not isinstance(name, str) or len(name) > LONGEST_NAME or not name.isprintable():
            raise InputError(
                f'the checkpoint {path} is damaged: a name must be of at most {LONGEST_NAME} printable letters, got '
                f'{shown(repr(name))}'
            )


def _check_tensors(state: Mapping[str, Tensor], path: object, size: int) -> None:
    claimed, held = 0, {}
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            kind = 'nested' if value.is_nested else str(value.dtype if value.is_quantized else value.layout)
            kind = kind.replace('torch.', '')
            raise InputError(f'the checkpoint {path} cannot be used: {shown(name)} must be a dense tensor, got {kind}')
        if value.dtype not in DTYPES:
            raise InputError(
                f'the checkpoint {path} cannot be used: {shown(name)} must be of a type that weights have, got '
                f'{value.dtype}'
            )
        if value.device.type == 'meta':
            raise InputError(
                f'the checkpoint {path} cannot be used: {shown(name)} must have values, got none (device meta)'
            )
        claimed += value.numel() * value.element_size()
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    # A pickle may also make memory with nothing in it.
    if claimed > LARGEST_REPEAT * min(sum(held.values()), size) + SMALL_BYTES:
        largest = max(state, key=lambda name: state[name].numel())
        raise InputError(
            f'the checkpoint {path} is damaged: its tensors must have the values that it holds, got {shown(largest)} '
            f'of shape {shown(str(tuple(state[largest].shape)))}'
        )


@contextlib.contextmanager
def bounded(state: Mapping[str, Tensor], factor: int, more: int = FEW_VALUES) -> Iterator[None]:
    """Build no network that is much larger than the state dict that it is for: sizes are read from names and shapes.

    Args:
        state: The state dict.
        factor: How many times its values, and its tensors, all that is built may have.
        more: How many values it may have beside.

    Raises:
        InputError: The network is larger, or the state dict has more tensors than any network.
    """
    if len(state) > LARGEST_STATE:
        raise InputError(f'the state dict of a network must have at most {LARGEST_STATE:,} tensors, got {len(state):,}')
    values = factor * sum(value.numel() for value in state.values()) + more
    sentence = 'the network that its names and shapes tell of must have about the values that are in it, got far more'
    with at_most(values, factor * len(state) + FEW_TENSORS, sentence):
        yield


def check_numbers(state: Mapping[str, Tensor]) -> None:
    """Check that the layers of a state dict have no numbers that are far beyond the count of its tensors.

    Raises:
        InputError: One has: whoever builds as many layers as it says does not come to an end.
    """
    most = FEW_TENSORS + len(state)
    for name in state:
        for part in name.split('.'):
            if part.isdecimal() and (len(part) > LARGEST_DIGITS or int(part) > most):
                raise InputError(
                    f'its layers must have numbers of about the count of its tensors, {len(state):,}, got {shown(name)}'
                )


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Let the process have at most so many bytes more, where the system can limit it, as Linux does.

    A constructor may make large tensors on the way to small ones, of which :func:`at_most` is not told. What needs more
    ends in an exception.
    """
    try:
        import resource

        pages = int(Path('/proc/self/statm').read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    with _LIMITING:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # new ones would take memory for themselves, and end the process without it
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + more
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            torch.set_num_threads(threads)


@contextlib.contextmanager
def at_most(values: int, tensors: int, sentence: str) -> Iterator[None]:
    """Build no network of more parameters and buffers.

    torch tells of a tensor when a module takes it, which is before anything is written into its memory.

    Args:
        values: How many numbers they may hold.
        tensors: How many of them there may be.
        sentence: What to say of more.

    Raises:
        InputError: There are more.
    """
    built, held, thread = 0, 0, threading.get_ident()

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal built, held
        if value is None or is_lazy(value) or threading.get_ident() != thread:
            return
        built, held = built + 1, held + value.numel()
        if held > values or built > tensors:
            raise InputError(sentence)

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
