"""Adapter files: out of an adapted checkpoint, onto a base, mixed with others, and what is in one."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from lora_sr.adapters import (
    Adapter,
    ForeignAdapter,
    apply_adapter,
    extract_adapter,
    merge_adapter,
    mix_adapters,
    peft_layout,
    save_adapter,
)
from lora_sr.adapters.adapter_file import SUFFIX
from lora_sr.adapters.foreign_files import PEFT_CONFIG, PEFT_WEIGHTS, weights_file
from lora_sr.adapters.layers import shape_text
from lora_sr.archs import is_training_form
from lora_sr.checkpoints import AdapterFile, Checkpoint, NetworkSource, Origin, open_network
from lora_sr.checkpoints.adapter_file import check_once, fitted
from lora_sr.checkpoints.checkpoint import ADAPTED, ADAPTER
from lora_sr.checkpoints.families import OURS
from lora_sr.checkpoints.layouts import in_layout
from lora_sr.checkpoints.networks import UnknownNetwork
from lora_sr.checkpoints.origin import DERIVED, KEY, fingerprint
from lora_sr.checkpoints.writing import SUFFIXES, write_state
from lora_sr.deploy.mixing import FittedMix, fit_mix
from lora_sr.errors import InputError, MissingBasicSR, shown
from lora_sr.files import check_not_input, check_output, check_output_folder, replacing_together, write_errors


@dataclass(frozen=True)
class Pairs:
    """Paired images to fit the weights of a mix to.

    Args:
        gt: Folder of the original images.
        lr: Folder of the LR images of the same names (or with ``x{scale}`` behind), ``None`` for those of a
            published set, or else made by bicubic.
        scale: Scale factor.
    """

    gt: str | os.PathLike[str]
    lr: str | os.PathLike[str] | None
    scale: int


@dataclass(frozen=True)
class MixReport:
    """Which adapters :func:`apply_adapters` or :func:`merge_adapters` put onto a base, and with which weights."""

    adapters: list[str]
    weights: list[float]
    layers: int
    deltas: int
    fitted: FittedMix | None

    def __str__(self) -> str:
        width = max(map(len, self.adapters))
        lines = [f'{name:{width}}  weight {weight:.4f}' for name, weight in zip(self.adapters, self.weights)]
        beside = f', parameters with a delta: {self.deltas}' if self.deltas else ''
        lines.append(f'layers with LoRA: {self.layers}{beside}')
        if self.fitted:
            fit = self.fitted
            lines.append(
                f'PSNR (Y) on {fit.images} images: base {fit.psnr_base:.4f} dB, with the first '
                f'weights {fit.psnr_before:.4f} dB, with these {fit.psnr_after:.4f} dB'
            )
        return '\n'.join(lines)


def extract_to_file(
    checkpoint: str | os.PathLike, output: str | os.PathLike, param_key: str | None = None, overwrite: bool = False
) -> str:
    """Write the adapter of an adapted checkpoint, of any network, to a file of its own.

    Args:
        checkpoint: A checkpoint of a base with LoRA.
        output: The ``.safetensors`` file to write.
        param_key: Where the state dict is in ``checkpoint``; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        overwrite: Replace ``output`` where it exists.

    Returns:
        What is in it, see :func:`describe_file`.

    Raises:
        InputError: ``checkpoint`` cannot be read, carries no LoRA or is an adapter already; or ``output`` exists, has
            another suffix, is ``checkpoint``, or cannot be written.
    """
    check_output(output, (SUFFIX,), overwrite)
    check_not_input(Path(output), [checkpoint])
    found = Checkpoint.read(checkpoint, param_key)
    origin = replace(found.origin or Origin(), base=found.fingerprint)
    save_adapter(_adapter_of(found), output, overwrite, {KEY: origin.to_json()})
    return describe_file(output)


def apply_adapters(
    base: str | os.PathLike[str] | NetworkSource,
    adapters: Sequence[tuple[str | os.PathLike[str], float | None]],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    pairs: Pairs | None = None,
) -> MixReport:
    """Put adapters onto a base checkpoint, of any network: the checkpoint of the adapted network.

    Args:
        base: A checkpoint of the base, of any network; or a :class:`lora_sr.checkpoints.NetworkSource` for a base that
            no family knows, or to put adapters on another base than their own.
        adapters: Adapter files, each with its weight, see :func:`lora_sr.adapters.mix_adapters`. ``None`` is 1, or an
            equal share with ``pairs``.
        output: The file to write, ``.pth`` (state dict under ``params``) or ``.safetensors``.
        overwrite: Replace ``output`` where it exists.
        pairs: Fit the weights to these images, see :func:`lora_sr.deploy.mixing.fit_mix`, beginning with those
            that are given.

    Raises:
        InputError: A file cannot be read or is of another kind, an adapter does not fit the base, the pairs cannot be
            used, or ``output`` exists, has another suffix, is an input or cannot be written.
    """
    return _mix(base, adapters, output, overwrite, pairs, apply_adapter)


def merge_adapters(
    base: str | os.PathLike[str] | NetworkSource,
    adapters: Sequence[tuple[str | os.PathLike[str], float | None]],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    pairs: Pairs | None = None,
) -> MixReport:
    """Merge adapters into a base checkpoint, of any network: a plain checkpoint of the base's network.

    Arguments, result and errors are those of :func:`apply_adapters`. With weights of 0 the tensors are the base's.
    """
    return _mix(base, adapters, output, overwrite, pairs, merge_adapter)


def export_adapters(
    base: str | os.PathLike[str] | NetworkSource,
    adapters: Sequence[tuple[str | os.PathLike[str], float | None]],
    output: str | os.PathLike[str],
    overwrite: bool = False,
) -> str:
    """Write adapters, mixed by their weights, as one adapter of PEFT, see :func:`lora_sr.adapters.peft_layout`.

    Args:
        base: As that of :func:`apply_adapters`, of a network that is known.
        adapters: Adapter files, each with its weight; ``None`` is 1.
        output: The folder to write, with ``adapter_model.safetensors`` and ``adapter_config.json``.
        overwrite: Replace the two where they exist.

    Returns:
        The layers and their ranks, as text for the terminal.

    Raises:
        InputError: A file cannot be read or is of another kind, an adapter does not fit the base or changes what PEFT
            has no LoRA for, or the folder cannot be written.
    """
    folder = Path(output)
    check_output_folder(folder)
    paths = [folder / PEFT_WEIGHTS[0], folder / PEFT_CONFIG]
    source = base if isinstance(base, NetworkSource) else NetworkSource(base)
    checkpoint = _read_base(source)
    inputs = [checkpoint.path, *(weights_file(path) for path, _ in adapters)]
    for path in paths:
        if folder.is_dir():
            check_output(path, (path.suffix,), overwrite)
            check_not_input(path, inputs)
    files = _read_adapters(adapters, source)
    network = open_network(replace(source, checkpoint=checkpoint, adapters=())).network
    state = network.state_dict()
    parts = _parts(files, source, checkpoint, state, is_training_form(network))
    mixed = mix_adapters((part, 1.0 if weight is None else weight) for part, (_, weight) in zip(parts, adapters))
    tensors, config = peft_layout(mixed, network)
    origin = replace(checkpoint.origin or Origin(), base=fingerprint(state))
    contents = (
        save(tensors, metadata={'format': 'pt', KEY: origin.to_json()}),
        f'{json.dumps(config, indent=2)}\n'.encode(),
    )
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing_together(paths, overwrite) as partials:
        for partial, content in zip(partials, contents):
            with write_errors(folder):
                partial.write_bytes(content)
    return describe_file(folder)


def describe_file(path: str | os.PathLike) -> str:
    """What is in an adapter file of any layout, or in an adapted checkpoint's adapter, as text for the terminal.

    Layers of the same shapes, rank and alpha whose names differ in numbers alone are one line of its table; so are
    the parameters with a delta besides.

    Raises:
        InputError: The file cannot be read, or there is no LoRA in it.
    """
    path = weights_file(path)
    checkpoint = Checkpoint.read(path)
    is_adapter = checkpoint.form == ADAPTER
    adapter: Adapter | ForeignAdapter = AdapterFile.of(checkpoint).adapter if is_adapter else _adapter_of(checkpoint)
    rows: dict[tuple, list[str]] = {}
    for name in adapter.layers:
        factors, alpha = adapter.factors_of(name), adapter.alpha_of(name)
        size = sum(factor.numel() for factor in factors)
        shapes = ', '.join(shape_text(factor.shape) for factor in factors)
        kind = shapes, adapter.rank_of(name), 'unknown' if math.isnan(alpha) else f'{alpha:g}'
        rows.setdefault((re.sub(r'\d+', '*', name), *kind, size), []).append(name)
    for name, delta in adapter.deltas.items():
        rows.setdefault((re.sub(r'\d+', '*', name), shape_text(delta.shape), '-', '-', delta.numel()), []).append(name)
    table = [('layer, or parameter with a delta', 'count', 'tensors', 'rank', 'alpha', 'parameters')]
    for (_, shapes, rank, alpha, size), names in rows.items():
        table.append((shown(_pattern(names)), str(len(names)), shapes, str(rank), alpha, f'{size * len(names):,}'))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        '  '.join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))])
        for first, *rest in table
    ]
    in_deltas = sum(delta.numel() for delta in adapter.deltas.values())
    in_layers = sum(size * len(names) for (*_, size), names in rows.items()) - in_deltas
    lines += [
        '',
        f'{_kind(adapter, is_adapter)}, {path.stat().st_size:,} bytes',
        f'{len(adapter.layers)} layers with LoRA, {in_layers:,} parameters',
        f'{len(adapter.deltas)} parameters {_besides(adapter)} besides, {in_deltas:,} values'
        if in_deltas
        else 'nothing besides',
    ]
    if isinstance(adapter, ForeignAdapter) and adapter.obstacle:
        lines.append(f'it goes onto no base: {adapter.obstacle}')
    if checkpoint.origin is not None:
        lines.append(f'from {checkpoint.origin}')
    return '\n'.join(lines)


def _mix(
    base: str | os.PathLike[str] | NetworkSource,
    adapters: Sequence[tuple[str | os.PathLike[str], float | None]],
    output: str | os.PathLike[str],
    overwrite: bool,
    pairs: Pairs | None,
    finish: Callable[[Mapping[str, Tensor], Adapter], dict[str, Tensor]],
) -> MixReport:
    check_output(output, SUFFIXES, overwrite)
    source = base if isinstance(base, NetworkSource) else NetworkSource(base)
    checkpoint = _read_base(source)
    check_not_input(Path(output), [checkpoint.path, *(weights_file(path) for path, _ in adapters)])
    files = _read_adapters(adapters, source)
    network = _network(source, checkpoint, pairs)
    state = _state_of(checkpoint, network)
    parts = _parts(files, source, checkpoint, state, network is not None and is_training_form(network))
    unsaid = 1 / len(adapters) if pairs else 1.0
    weights = [unsaid if weight is None else weight for _, weight in adapters]
    fit = None
    if pairs:
        assert network is not None
        fit = fit_mix(network, parts, weights, pairs.gt, pairs.lr, pairs.scale)
        weights = fit.weights
    mixed = mix_adapters(zip(parts, weights))
    is_merged = finish is merge_adapter  # else the file carries them beside its base
    origin = (checkpoint.origin or Origin()).with_adapters(
        state, (file.fingerprint for file, weight in zip(files, weights) if weight)
    )
    written = finish(state, mixed)  # which is exact
    for key, value in written.items():
        if value is not state.get(key) and not value.isfinite().all():
            raise InputError(
                f'The adapters give values that are not finite, or too large for {value.dtype}: {shown(key)}.'
            )
    if is_merged:  # under the names of the file of the base, which an adapted one only notes
        written = in_layout(written, checkpoint.layout)
    write_state(written, Path(output), replace(origin, layout=None if is_merged else checkpoint.layout or None))
    return MixReport([os.fspath(path) for path, _ in adapters], weights, len(mixed.layers), len(mixed.deltas), fit)


def _read_adapters(
    adapters: Sequence[tuple[str | os.PathLike[str], float | None]], source: NetworkSource
) -> list[AdapterFile]:
    files = [AdapterFile.read(path) for path, _ in adapters]
    check_once(files, source.force)
    return files


def _parts(
    files: Sequence[AdapterFile],
    source: NetworkSource,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    has_branches: bool,
) -> list[Adapter]:
    """What the files are for a base, given by its checkpoint and by the state dict of its network."""
    origin, layout, content = checkpoint.origin, checkpoint.layout, checkpoint.content
    return fitted(files, state, origin, checkpoint.path, has_branches, layout, content, source.force)


def _read_base(source: NetworkSource) -> Checkpoint:
    path = source.checkpoint
    if path is None or isinstance(path, nn.Module):
        raise InputError('The base of an adapter must be a checkpoint, got none.')
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.read(path, source.param_key)
    if checkpoint.form == ADAPTER:
        raise InputError(f'{path} is an adapter, where a checkpoint of the base is right.')
    if checkpoint.form == ADAPTED:
        raise InputError(
            f'{path} carries LoRA already, where a checkpoint of the base is right: merge it with `lora-sr merge`, or '
            'take its adapter out with `lora-sr adapter extract`.'
        )
    return checkpoint


def _adapter_of(checkpoint: Checkpoint) -> Adapter:
    if checkpoint.form == ADAPTER:
        raise InputError(f'{checkpoint.path} is an adapter already, where an adapted checkpoint is right.')
    try:
        return extract_adapter(checkpoint.state)
    except InputError as error:
        raise InputError(f'{checkpoint.path} cannot be used: {error}') from None


def _network(source: NetworkSource, checkpoint: Checkpoint, pairs: Pairs | None) -> nn.Module | None:
    """The base network with its weights; ``None`` where it is not known and not needed."""
    try:
        return open_network(replace(source, checkpoint=checkpoint, adapters=())).network
    except UnknownNetwork as error:  # a network of one's own may look like a stock one
        if checkpoint.family in OURS or (pairs and checkpoint.family is not None):
            raise
        if pairs:
            raise InputError(
                f'{checkpoint.path} belongs to no network known here, so --fit cannot run it: give '
                'an option file whose network_g is that network, with -opt.'
            ) from error
    except MissingBasicSR:  # no network is needed for adding up
        if pairs:
            raise
    return None


def _state_of(checkpoint: Checkpoint, network: nn.Module | None) -> Mapping[str, Tensor]:
    """The state dict of a base, whose layout is that of its checkpoint.

    It is that of the file, whose precision stays, unless the network has other names: training-form files of SPAN hold
    more, and what stands before those of an unknown network only the network tells.
    """
    if network is None:
        return checkpoint.state
    state = network.state_dict()
    own, of_network = ({key for key in one if not key.endswith(DERIVED)} for one in (checkpoint.state, state))
    return checkpoint.state if own == of_network else state


def _kind(adapter: Adapter | ForeignAdapter, is_adapter: bool) -> str:
    if isinstance(adapter, ForeignAdapter):
        return f'adapter in the layout of {adapter.kind}'
    return 'adapter' if is_adapter else 'adapted checkpoint'


def _besides(adapter: Adapter | ForeignAdapter) -> str:
    return 'with a delta' if isinstance(adapter, Adapter) else 'as a whole'


def _pattern(names: list[str]) -> str:
    """Names that differ in numbers alone as one, with ``*`` for those that differ."""
    parts = zip(*(re.split(r'(\d+)', name) for name in names))
    return ''.join(part[0] if len(set(part)) == 1 else '*' for part in parts)
