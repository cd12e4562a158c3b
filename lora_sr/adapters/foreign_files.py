"""Files of adapters that other programs write: told by their keys, and read with what stands beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_sr.adapters.config import LARGEST_ALPHA
from lora_sr.adapters.foreign import ForeignAdapter
from lora_sr.adapters.foreign_products import MAGNITUDES, Update
from lora_sr.adapters.layers import DTYPES, shape_text
from lora_sr.adapters.patterns import MOST_STEPS, Patterns, check_simple
from lora_sr.errors import InputError, shown
from lora_sr.files import check_regular

PEFT_PREFIX = 'base_model.model.'
PEFT_CONFIG, PEFT_WEIGHTS = 'adapter_config.json', ('adapter_model.safetensors', 'adapter_model.bin')
LARGEST_CONFIG = 2**20  # bytes
MOST_MATCHES = 2 * 10**6  # of patterns with names: some seconds

# What PEFT appends to the name of a layer, in its files and, with the name of the adapter, in its networks.
_PEFT_KEY = re.compile(
    r'(?P<layer>.+)\.(?P<part>lora_embedding_[AB]|lora_magnitude_vector|lora_[AB](?=\.))(?P<name>\.[^.]+?)??'
    r'(?P<what>\.weight|\.bias)?'
)
_KOHYA_KEY = re.compile(
    r'(?P<layer>.+)\.(?P<part>lora_(?:down|up|mid)\.weight|alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|'
    r'lokr_(?:w[12](?:_[ab])?|t[12])|oft_blocks|oft_diag|on_input|diff|diff_b|w_norm|b_norm)'
)
_EVIDENCE = ('lora_', 'hada_', 'lokr_', 'oft_')  # beginnings of the parts that no base has
_UNKNOWN = {
    'oft_blocks': 'OFT',
    'oft_diag': 'OFT',
    'on_input': '(IA)^3',
    'diff': 'whole differences',
    'diff_b': 'whole differences',
    'w_norm': 'normalizations',
    'b_norm': 'normalizations',
}

# Options of PEFT under which an update is not that of LoRA, or the base is not the one that is named.
_REFUSED_OPTIONS = (
    *('alora_invocation_tokens', 'arrow_config', 'kasa_config', 'layer_replication', 'monteclora_config'),
    *('target_parameters', 'trainable_token_indices', 'use_bdlora', 'use_qalora', 'velora_config'),
)
_HARMLESS_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')  # of the updates; others also change the base


def is_foreign(state: Iterable[str]) -> bool:
    """Whether the keys of a file are those of an adapter of another program."""
    return any(map(_is_evidence, state))


def _is_evidence(key: str) -> bool:
    if _PEFT_KEY.fullmatch(key):
        return True
    match = _KOHYA_KEY.fullmatch(key)
    return match is not None and match['part'].startswith(_EVIDENCE)


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file of weights that a path names: itself, or that in a folder which PEFT has written."""
    path = Path(path)
    return next((path / name for name in PEFT_WEIGHTS if path.is_dir() and (path / name).is_file()), path)


def read_foreign(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> ForeignAdapter:
    """The adapter of a file that has been read, and of PEFT's configuration beside it.

    Args:
        tensors: What is in the file, by name.
        path: The file.

    Raises:
        InputError: The parts of a layer do not go with each other, or the configuration cannot be read.
    """
    try:
        if any(key.startswith(PEFT_PREFIX) or _PEFT_KEY.fullmatch(key) for key in tensors):
            return _parse_peft(tensors, _config_beside(Path(path)))
        return _parse_kohya(tensors)
    except InputError as error:
        raise InputError(f'{path} cannot be used: {str(error).rstrip(".")}.') from None


def _config_beside(path: Path) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says in the folder of a file; ``None`` where there is none."""
    path = path.with_name(PEFT_CONFIG)
    if not os.path.lexists(path):
        return None
    check_regular(path, 'the configuration')
    try:
        with open(path, 'rb') as file:
            text = file.read(LARGEST_CONFIG + 1)
        config = json.loads(text) if len(text) <= LARGEST_CONFIG else None
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f'{PEFT_CONFIG} beside it must be a JSON object of at most {LARGEST_CONFIG:,} bytes')
    return config


def _parse_peft(tensors: Mapping[str, Tensor], config: dict[str, Any] | None) -> ForeignAdapter:
    parts, values = _parts_of_peft(tensors)
    scales = _PeftScales(config, len(parts))
    updates = {layer.replace('.base_layer.', '.'): _peft_update(layer, held, scales) for layer, held in parts.items()}
    obstacle = scales.obstacle
    if obstacle is None and any(update.alpha is None for update in updates.values()):
        obstacle = (
            f'its alpha is unknown without {PEFT_CONFIG} beside it: where that is lost, write one with what it was '
            'trained with, e.g. {"r": 8, "lora_alpha": 16}'
        )
    return ForeignAdapter('PEFT', updates, values, obstacle)


def _parts_of_peft(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Name of a layer -> its parts, and whole values by name; of a file, or of the state dict of PEFT's network."""
    start = len(PEFT_PREFIX)
    named = [(key[start:] if key.startswith(PEFT_PREFIX) else key, value) for key, value in tensors.items()]
    matches = {key: match for key, match in ((key, _PEFT_KEY.fullmatch(key)) for key, _ in named) if match}
    adapters = list(dict.fromkeys(shown(match['name'][1:]) for match in matches.values() if match['name']))
    if len(adapters) > 1:
        raise InputError(f'it must hold one adapter, got {" and ".join(adapters[:2])}')
    parts: dict[str, dict[str, Tensor]] = {match['layer']: {} for match in matches.values()}
    values: dict[str, Tensor] = {}
    for key, value in named:
        match, other = matches.get(key), _KOHYA_KEY.fullmatch(key)
        if match is not None:
            held, part = parts[match['layer']], match['part'] + ('.bias' if match['what'] == '.bias' else '')
        elif other is not None and other['part'] == 'alpha' and other['layer'] in parts:
            held, part = parts[other['layer']], 'alpha'
        elif other is not None and other['part'].startswith(_EVIDENCE):
            raise InputError(f'it must hold LoRA to be an adapter of PEFT, got {shown(key)}')
        elif '.original_module.' in key:  # in the place of which one of modules_to_save stands
            continue
        else:
            held, part = values, re.sub(r'\.modules_to_save\.[^.]+', '', key.replace('.base_layer.', '.'))
        if part in held:
            raise InputError(f'it must have each name once, got two of {shown(key)}')
        held[part] = value
    return parts, values


def _peft_update(layer: str, held: Mapping[str, Tensor], scales: _PeftScales) -> Update:
    is_embedding = any(part.startswith('lora_embedding') for part in held)
    ends = ('lora_embedding_A', 'lora_embedding_B') if is_embedding else ('lora_A', 'lora_B')
    # Without these it would still be LoRA, but not what was trained.
    of_options = {'use_dora': 'lora_magnitude_vector', 'lora_bias': 'lora_B.bias'}
    wanted = [*ends, *(part for key, part in of_options.items() if scales.options.get(key))]
    missing = [part for part in wanted if part not in held]
    if missing:
        raise InputError(f'it lacks {" and ".join(missing)} of the layer {shown(layer)}')
    names = {ends[0]: 'down', ends[1]: 'up', 'lora_B.bias': 'bias', 'lora_magnitude_vector': 'lora_magnitude_vector'}
    parts = {names[part]: value for part, value in held.items() if part in names}
    _check_factors(layer, parts, may_have_groups=True)
    is_transposed = is_embedding or bool(scales.options.get('fan_in_fan_out'))
    rank, alpha = scales.of(layer.partition('.base_layer')[0])
    if rank is not None and rank != parts['down'].shape[0]:
        raise InputError(
            f'{PEFT_CONFIG} beside it must have the rank {parts["down"].shape[0]} for {shown(layer)}, as its tensors '
            f'have, got {shown(repr(rank))}'
        )
    if 'alpha' in held:
        return Update(parts, is_transposed, _alpha(held['alpha'], layer))
    return Update(parts, is_transposed, alpha, bool(scales.options.get('use_rslora')))


class _PeftScales:
    """The ranks and alphas of PEFT's configuration: anything may stand in it.

    Args:
        options: The configuration.
        count: Number of the layers.
    """

    def __init__(self, options: dict[str, Any] | None, count: int):
        self.is_there = options is not None
        self.options = options or {}
        self.obstacle = _obstacle(self.options)
        self.patterns = {
            key: self._patterns(key, count) for key in ('rank_pattern', 'alpha_pattern') if self.options.get(key)
        }

    def _patterns(self, key: str, count: int) -> tuple[Patterns, list[Any]]:
        values = self.options[key]
        if not isinstance(values, dict) or len(values) * count > MOST_MATCHES:
            most = MOST_MATCHES // max(1, count)
            raise InputError(f'"{key}" of {PEFT_CONFIG} must map at most {most:,} patterns, got {shown(repr(values))}')
        patterns = []
        for pattern in values:
            check_simple(pattern)
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                raise InputError(f'the pattern {shown(repr(pattern))} is not a regular expression') from None
            # PEFT looks for it at the end of a name, behind a dot, unless it says where the name begins.
            is_whole = pattern.startswith('^') and '|' not in pattern
            patterns.append(pattern[1:] if is_whole else f'(.*\\.|)({pattern})')
        return Patterns(patterns, MOST_STEPS), list(values.values())

    def of(self, layer: str) -> tuple[Any, float | None]:
        """Rank and alpha of a layer, as the configuration has them; ``None`` where it has not."""
        if not self.is_there:
            return None, None
        alpha = self._of('alpha_pattern', layer, self.options.get('lora_alpha', 8))  # as PEFT has it by default
        return self._of('rank_pattern', layer, self.options.get('r')), _number(alpha, layer)

    def _of(self, key: str, layer: str, default: Any) -> Any:
        if key not in self.patterns:
            return default
        patterns, values = self.patterns[key]
        found = patterns.matching(layer)
        return values[patterns.patterns.index(found[0])] if found else default


def _obstacle(options: Mapping[str, Any]) -> str | None:
    """Why an adapter of PEFT of this configuration is more, or something else, than LoRA on a base."""
    kind = options.get('peft_type', 'LORA')
    if kind != 'LORA':
        return f'"peft_type" of {PEFT_CONFIG} must be "LORA", got {shown(repr(kind))}'
    for key in _REFUSED_OPTIONS:
        if options.get(key):
            return f'"{key}" of {PEFT_CONFIG} must not be set: such an update is not that of LoRA'
    start = options.get('init_lora_weights', True)
    if not any(start is harmless or (isinstance(start, str) and start == harmless) for harmless in _HARMLESS_STARTS):
        return (
            f'"init_lora_weights" of {PEFT_CONFIG} must leave the base as it is, got {shown(repr(start))}: convert it '
            'with path_initial_model_for_weight_conversion of save_pretrained'
        )
    return None


def _parse_kohya(tensors: Mapping[str, Tensor]) -> ForeignAdapter:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KOHYA_KEY.fullmatch(key)
        kind = None if match is None else _UNKNOWN.get(match['part'])
        if match is None or kind:
            what = '' if match is None else f', i.e. {kind}'
            raise InputError(f'it must hold LoRA, LoHa or LoKr alone, got {shown(key)}{what}')
        names = {'lora_down.weight': 'down', 'lora_up.weight': 'up', 'lora_mid.weight': 'mid'}
        parts.setdefault(match['layer'], {})[names.get(match['part'], match['part'])] = value
    updates = {}
    for layer, held in parts.items():
        alpha = held.pop('alpha', None)
        _check_kohya(layer, held)
        update = Update(held)
        updates[layer] = Update(held, alpha=update.rank if alpha is None else _alpha(alpha, layer))
    return ForeignAdapter('kohya', updates)


def _check_kohya(layer: str, held: Mapping[str, Tensor]) -> None:
    """Check that a layer has the parts of one kind of update, and all of them."""
    of_lora = {'down': 'lora', 'up': 'lora', 'mid': 'lora'}
    kinds = {of_lora.get(part, part.partition('_')[0]) for part in held if part not in MAGNITUDES}
    if kinds == {'hada'}:
        wanted = {f'hada_w{number}_{end}' for number in '12' for end in 'ab'}
        wanted |= {'hada_t1', 'hada_t2'} if {'hada_t1', 'hada_t2'} & held.keys() else set()
    elif kinds == {'lokr'}:
        wanted = set()
        for matrix in ('lokr_w1', 'lokr_w2'):
            wanted |= {matrix} if matrix in held else {f'{matrix}_a', f'{matrix}_b'}
    elif kinds <= {'lora'}:
        wanted = {'down', 'up'}
    else:
        raise InputError(f'it has updates of several kinds for the layer {shown(layer)}, {" and ".join(sorted(kinds))}')
    missing = [{'down': 'lora_down', 'up': 'lora_up'}.get(part, part) for part in sorted(wanted - held.keys())]
    if missing:
        raise InputError(f'it lacks {" and ".join(missing)} of the layer {shown(layer)}')
    if 'down' in held:
        _check_factors(layer, held, may_have_groups=False)
    for part, value in held.items():
        is_matrix = value.ndim > 1 or part in MAGNITUDES
        if value.dtype not in DTYPES or not value.numel() or not is_matrix:
            raise InputError(f'{part} of {shown(layer)} must be a matrix of floating-point numbers, got {_kind(value)}')


def _check_factors(layer: str, parts: Mapping[str, Tensor], may_have_groups: bool) -> None:
    """Check that those of LoRA go with each other, whatever they are for."""
    up, down, mid = parts['up'], parts['down'], parts.get('mid')
    goes = up.ndim > 1 < down.ndim and min(*up.shape, *down.shape) > 0 and up.numel() == up.shape[0] * up.shape[1]
    if goes and mid is not None:
        goes = mid.ndim > 2 and tuple(mid.shape[:2]) == (up.shape[1], down.shape[0])
        goes = goes and down.numel() == down.shape[0] * down.shape[1]
    elif goes:
        goes = down.shape[0] == up.shape[1] or (may_have_groups and down.shape[0] % up.shape[1] == 0)
    if not goes:
        between = '' if mid is None else f', {shape_text(mid.shape)}'
        raise InputError(
            f'the update of {shown(layer)} is damaged: {shape_text(down.shape)}{between} and {shape_text(up.shape)} do '
            'not go with each other'
        )
    for value in parts.values():
        if value.dtype not in DTYPES:
            raise InputError(f'the update of {shown(layer)} must be of floating-point numbers, got {_kind(value)}')


def _kind(value: Tensor) -> str:
    return f'{value.dtype} of {shape_text(value.shape)}'


def _alpha(value: Tensor, layer: str) -> float:
    if value.numel() != 1 or value.is_complex():
        raise InputError(f'alpha of {shown(layer)} must be a number, got {_kind(value)}')
    return _number(value.item(), layer)


def _number(alpha: Any, layer: str) -> float:
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not 0 < abs(alpha) <= LARGEST_ALPHA:
        raise InputError(
            f'alpha of {shown(layer)} must be a number of at most {LARGEST_ALPHA:g} other than 0, got '
            f'{shown(repr(alpha))}'
        )
    return float(alpha)
