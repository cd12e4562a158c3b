"""Adapter files: out of an adapted checkpoint, onto a base, mixed with others, and what is in one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from lora_sr.adapters import (
    Adapter,
    apply_adapter,
    describe_misfit,
    extract_adapter,
    is_lora_key,
    merge_adapter,
    mix_adapters,
    read_adapter,
    remove_lora,
    save_adapter,
)
from lora_sr.adapters.adapter_file import SUFFIX
from lora_sr.archs import is_training_form
from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.archs.any_size import take_any_size
from lora_sr.checkpoints import load_network, read_state_dict
from lora_sr.checkpoints.content import load_weights
from lora_sr.checkpoints.loading import OURS, family_of
from lora_sr.checkpoints.writing import SUFFIXES, writing
from lora_sr.deploy.mixing import FittedMix, fit_mix
from lora_sr.errors import InputError
from lora_sr.files import check_output
from lora_sr.option_file import load_options


@dataclass(frozen=True)
class Pairs:
    """Paired images to fit the weights of a mix to.

    Args:
        gt: Folder of the original images.
        lr: Folder of the LR images of the same names (or with ``x{scale}`` behind).
        scale: Scale factor.
        options: An option file whose ``network_g`` is the base's network, or AdaptSR on it: for a base that
            :func:`lora_sr.load_network` does not know.
    """

    gt: str | os.PathLike
    lr: str | os.PathLike
    scale: int
    options: str | os.PathLike | None = None


@dataclass(frozen=True)
class MixReport:
    """Which adapters :func:`apply_adapters` or :func:`merge_adapters` put onto a base, and with which weights."""

    adapters: list[str]
    weights: list[float]
    layers: int
    fitted: FittedMix | None

    def __str__(self) -> str:
        width = max(map(len, self.adapters))
        lines = [f'{name:{width}}  weight {weight:.4f}' for name, weight in zip(self.adapters, self.weights)]
        lines.append(f'layers with LoRA: {self.layers}')
        if self.fitted:
            before, after = self.fitted.psnr_before, self.fitted.psnr_after
            lines.append(f'PSNR (Y) on {self.fitted.images} images: {before:.4f} dB before, {after:.4f} dB after')
        return '\n'.join(lines)


def extract_to_file(
    checkpoint: str | os.PathLike, output: str | os.PathLike, param_key: str | None = None, overwrite: bool = False
) -> str:
    """Write the adapter of an adapted checkpoint, of any network, to a file of its own.

    Args:
        checkpoint: A checkpoint of a base with LoRA, see :func:`lora_sr.checkpoints.read_state_dict`.
        output: The ``.safetensors`` file to write.
        param_key: Where the state dict is in ``checkpoint``; by default ``params_ema``, else ``params``.
        overwrite: Replace ``output`` where it exists.

    Returns:
        What is in it, see :func:`describe_file`.

    Raises:
        InputError: ``checkpoint`` cannot be read, carries no LoRA or is an adapter already; or ``output`` exists, has
            another suffix, or cannot be written.
    """
    check_output(output, (SUFFIX,), overwrite)
    save_adapter(_adapter_of(checkpoint, read_state_dict(checkpoint, param_key)), output, overwrite)
    return describe_file(output)


def apply_adapters(
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float | None]],
    output: str | os.PathLike,
    overwrite: bool = False,
    pairs: Pairs | None = None,
) -> MixReport:
    """Put adapters onto a base checkpoint, of any network: the checkpoint of the adapted network.

    Args:
        base: A checkpoint of the base, see :func:`lora_sr.checkpoints.read_state_dict`.
        adapters: Adapter files, each with its weight, see :func:`lora_sr.adapters.mix_adapters`. ``None`` is 1, or an
            equal share with ``pairs``.
        output: The file to write, ``.pth`` (state dict under ``params``) or ``.safetensors``.
        overwrite: Replace ``output`` where it exists.
        pairs: Fit the weights to these images, see :func:`lora_sr.deploy.mixing.fit_mix`, beginning with those
            that are given.

    Raises:
        InputError: A file cannot be read or is of another kind, an adapter does not fit the base, the pairs cannot be
            used, or ``output`` exists, has another suffix or cannot be written.
    """
    return _mix(base, adapters, output, overwrite, pairs, apply_adapter)


def merge_adapters(
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float | None]],
    output: str | os.PathLike,
    overwrite: bool = False,
    pairs: Pairs | None = None,
) -> MixReport:
    """Merge adapters into a base checkpoint, of any network: a plain checkpoint of the base's network.

    Arguments, result and errors are those of :func:`apply_adapters`. With weights of 0 the tensors are the base's.
    """
    return _mix(base, adapters, output, overwrite, pairs, merge_adapter)


def describe_file(path: str | os.PathLike) -> str:
    """What is in an adapter file, or in the adapter of an adapted checkpoint, as text for the terminal.

    Layers of the same shapes, rank and alpha whose names differ in numbers alone are one line of its table; so are
    the parameters that are shifted besides.

    Raises:
        InputError: The file cannot be read, or there is no LoRA in it.
    """
    state = read_state_dict(path)
    is_adapter = all(map(is_lora_key, state))
    adapter = read_adapter(path) if is_adapter else _adapter_of(path, state)
    rows: dict[tuple, list[str]] = {}
    for name in adapter.layers:
        lora_A, lora_B = (adapter.tensors[f'{name}.{tensor}'] for tensor in ('lora_A', 'lora_B'))
        kind = f'{_shape(lora_A)}, {_shape(lora_B)}', adapter.rank_of(name), f'{adapter.alpha_of(name):g}'
        rows.setdefault((re.sub(r'\d+', '*', name), *kind, lora_A.numel() + lora_B.numel()), []).append(name)
    for name, shift in adapter.shifts.items():
        rows.setdefault((re.sub(r'\d+', '*', name), _shape(shift), '-', '-', shift.numel()), []).append(name)
    table = [('layer or shifted parameter', 'count', 'tensors', 'rank', 'alpha', 'parameters')]
    for (_, shapes, rank, alpha, size), names in rows.items():
        table.append((_pattern(names), str(len(names)), shapes, str(rank), alpha, f'{size * len(names):,}'))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        '  '.join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))])
        for first, *rest in table
    ]
    in_shifts = sum(shift.numel() for shift in adapter.shifts.values())
    in_layers = sum(size * len(names) for (*_, size), names in rows.items()) - in_shifts
    lines += [
        '',
        f'{"adapter" if is_adapter else "adapted checkpoint"}, {Path(path).stat().st_size:,} bytes',
        f'{len(adapter.layers)} layers with LoRA, {in_layers:,} parameters',
        f'{len(adapter.shifts)} shifted parameters besides, {in_shifts:,} values' if in_shifts else 'nothing besides',
    ]
    return '\n'.join(lines)


def _mix(base, adapters, output, overwrite: bool, pairs: Pairs | None, finish) -> MixReport:
    check_output(output, SUFFIXES, overwrite)
    state = _read_base(base)
    loaded = [_read_adapter(path) for path, _ in adapters]
    network = _network(base, state, pairs)
    for (path, _), adapter in zip(adapters, loaded):
        misfit = describe_misfit(adapter, state if network is None else network.state_dict())
        if misfit:
            hint = ''
            if network is not None and is_training_form(network):
                hint = ' (the base has branches, which `lora-sr merge` folds)'
            raise InputError(f'The adapter {path} does not fit the base {base}: {misfit}{hint}.')
        for key, value in adapter.tensors.items():
            if not value.isfinite().all():
                raise InputError(f'The adapter {path} has values that are not finite, in {key}.')
    unsaid = 1 / len(adapters) if pairs else 1.0
    weights = [unsaid if weight is None else weight for _, weight in adapters]
    fitted = None
    if pairs:
        fitted = fit_mix(network, loaded, weights, pairs.gt, pairs.lr, pairs.scale)
        weights = fitted.weights
    mixed = mix_adapters(zip(loaded, weights))
    with writing(finish(state, mixed), Path(output)):
        pass  # what is written is exact: there is nothing to prove
    return MixReport([os.fspath(path) for path, _ in adapters], weights, len(mixed.layers), fitted)


def _read_base(path: str | os.PathLike) -> dict[str, Tensor]:
    state = read_state_dict(path)
    if all(map(is_lora_key, state)):
        raise InputError(f'{path} is an adapter, where a checkpoint of the base is right.')
    if any(map(is_lora_key, state)):
        raise InputError(
            f'{path} carries LoRA already, where a checkpoint of the base is right: merge it with `lora-sr merge`, or '
            'take its adapter out with `lora-sr adapter extract`.'
        )
    return state


def _read_adapter(path: str | os.PathLike) -> Adapter:
    if Path(path).suffix != SUFFIX and Path(path).is_file():
        carries_lora = any(map(is_lora_key, read_state_dict(path)))
        kind = 'an adapted checkpoint: take its adapter out with `lora-sr adapter extract`'
        raise InputError(f'{path} is no adapter but {kind if carries_lora else "a base checkpoint"}.')
    return read_adapter(path)


def _adapter_of(path: str | os.PathLike, state: dict[str, Tensor]) -> Adapter:
    if all(map(is_lora_key, state)):
        raise InputError(f'{path} is an adapter already, where an adapted checkpoint is right.')
    try:
        return extract_adapter(state)
    except InputError as error:
        raise InputError(f'{path} cannot be used: {error}') from None


def _network(base: str | os.PathLike, state: dict[str, Tensor], pairs: Pairs | None) -> nn.Module | None:
    """The base network with its weights; ``None`` where it is not known and not needed."""
    if pairs and pairs.options is not None:
        return _build(pairs.options, state, base)
    if family_of(state) is not None:
        try:
            return load_network(base)
        except InputError:  # a network of one's own may look like a stock one
            if pairs or family_of(state) in OURS:
                raise
    if pairs:
        raise InputError(
            f'{base} belongs to no network known here, so --fit cannot run it: give an option file whose network_g is '
            'that network, with -opt.'
        )
    return None


def _build(options: str | os.PathLike, state: dict[str, Tensor], base: str | os.PathLike) -> nn.Module:
    section = load_options(options).get('network_g')
    if isinstance(section, dict) and section.get('type') == AdaptSR.__name__:
        section = section.get('base')
    if not isinstance(section, dict) or 'type' not in section:
        raise InputError(f'{options} has no network_g with a type, of which {base} would be a checkpoint.')
    arguments = dict(section)
    name = arguments.pop('type')
    try:
        network = ARCH_REGISTRY.get(name)(**arguments)
    except KeyError:
        raise InputError(f'{options}: there is no registered network "{name}".') from None
    except Exception as error:  # whatever a constructor, also one of others, makes of wrong values
        raise InputError(f'{options}: {name} cannot be built from these values: {error}') from error
    remove_lora(network)
    load_weights(network, state, base)
    return take_any_size(network.eval())


def _shape(tensor: Tensor) -> str:
    return 'x'.join(map(str, tensor.shape))


def _pattern(names: list[str]) -> str:
    """Names that differ in numbers alone as one, with ``*`` for those that differ."""
    parts = zip(*(re.split(r'(\d+)', name) for name in names))
    return ''.join(part[0] if len(set(part)) == 1 else '*' for part in parts)
