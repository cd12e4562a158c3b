"""What to adapt, and how: one dataclass, the same in Python, in option files and in adapter files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_sr.adapters.groups import GROUPS
from lora_sr.adapters.patterns import MOST_STEPS, Patterns, check_simple
from lora_sr.errors import InputError, shown

ALSO_TRAIN = ('bias', 'norm', 'position', 'parameters', 'depthwise')
LARGEST_ALPHA = 1e30
LARGEST_RANK = 2**31 - 1


@dataclass
class LoRAConfig:
    """Low-rank adaptation of a network.

    Every pattern is a regular expression that must match the whole name of a module, as ``named_modules`` gives it:
    ``block_1.c1_r.eval_conv`` is matched by ``block_\\d\\.c[123]_r\\.eval_conv`` and by ``block_.*``.

    Args:
        target_modules: Patterns of the layers that receive LoRA.
        groups: Groups of layers that receive LoRA besides: ``conv``, ``attention``, ``mlp``, ``upsampler``, or ``all``;
            see :func:`lora_sr.adapters.layer_groups`. At least one pattern (also of a parameter) or group is needed.
        rank: Rank r of the update, at least 1.
        alpha: Numerator of the update's scale alpha / r. ``None`` stands for the rank, i.e. a scale of 1.
        exclude_modules: Patterns of layers that stay as they are although a target matches them.
        rank_pattern: Pattern -> rank, for layers that differ from ``rank``. The first match counts. A rank of 0
            leaves a layer as it is.
        alpha_pattern: Pattern -> alpha, likewise.
        also_train: What trains besides, as a delta beside its frozen value:

            - ``bias``: the biases of the adapted layers;
            - ``norm``: scale and offset of all normalization layers;
            - ``position``: tables of relative positions;
            - ``parameters``: what the network registers outside of layers (layer scales, learned tokens, scalars) and
              the weights of ``PReLU``, but not what it freezes itself;
            - ``depthwise``: the weights of depth-wise convolutions, which then receive no LoRA.

            ``exclude_modules`` and ranks of 0 hold for the last two also.
        target_parameters: Patterns of parameters that train as a delta besides, by their whole names in the network.

    Raises:
        InputError: A rank below 1, an alpha of 0, a pattern that is no regular expression, or an unknown group or word.
    """

    target_modules: list[str] = field(default_factory=list)
    rank: int = 8
    alpha: float | None = None
    exclude_modules: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    also_train: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known: dict[str, Patterns] = {}
        self._most_steps = math.inf
        for name in ('target_modules', 'exclude_modules', 'groups', 'also_train', 'target_parameters'):
            value = getattr(self, name)
            if not isinstance(value, (str, list, tuple, type(None))):
                raise InputError(f'"{name}" of LoRA must be a list, got {shown(repr(value))}.')
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))
        for name in ('rank_pattern', 'alpha_pattern'):
            value = getattr(self, name)
            if not isinstance(value, (Mapping, type(None))):
                raise InputError(
                    f'"{name}" of LoRA must be a section of patterns and numbers, got {shown(repr(value))}.'
                )
            setattr(self, name, dict(value or {}))
        for name, known in (('groups', (*GROUPS, 'all')), ('also_train', ALSO_TRAIN)):
            for word in getattr(self, name):
                if word not in known:
                    near = difflib.get_close_matches(str(word), known, n=1)
                    hint = f'did you mean "{near[0]}"?' if near else f'known are {", ".join(known)}.'
                    raise InputError(f'{name} of LoRA has no "{shown(str(word))}": {hint}')
        if not self.target_modules and not self.groups and not self.target_parameters:
            raise InputError('LoRA has neither groups nor target_modules: say what to adapt, e.g. groups: [all].')
        for key, rank in [('rank', self.rank), *self.rank_pattern.items()]:
            least = 1 if key == 'rank' else 0
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < least:
                raise InputError(
                    f'LoRA rank of "{shown(str(key))}" must be an integer of at least {least}, got {shown(repr(rank))}.'
                )
            if rank > LARGEST_RANK:
                raise InputError(f'LoRA rank of "{shown(str(key))}" must be at most {LARGEST_RANK}, got {rank}.')
        for key, alpha in [('alpha', self.alpha), *self.alpha_pattern.items()]:
            if alpha is None and key == 'alpha':
                continue
            is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
            if alpha is None or not is_number or not 0 < abs(alpha) <= LARGEST_ALPHA:
                raise InputError(
                    f'LoRA alpha of "{shown(str(key))}" must be a number of at most {LARGEST_ALPHA:g} other than 0, '
                    f'got {shown(repr(alpha))}.'
                )
        patterns = [*self.target_modules, *self.exclude_modules, *self.target_parameters]
        for pattern in [*patterns, *self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern)
            except (re.error, TypeError, OverflowError, RecursionError) as error:
                raise InputError(
                    f'The pattern {shown(repr(pattern))} is not a regular expression: {shown(str(error))}.'
                ) from None

    def is_target(self, name: str, group: str) -> bool:
        """Whether the layer called ``name``, of that group, is to receive LoRA."""
        is_wanted = bool({group, 'all'} & set(self.groups)) or bool(self._matching('target_modules', name))
        return is_wanted and not self.is_excluded(name)

    def is_excluded(self, name: str) -> bool:
        """Whether the module called ``name`` stays as it is, whatever targets it."""
        return bool(self._matching('exclude_modules', name)) or self.rank_of(name) == 0

    def rank_of(self, name: str) -> int:
        """The rank for the layer called ``name``."""
        patterns = self._matching('rank_pattern', name)
        return self.rank_pattern[patterns[0]] if patterns else self.rank

    def alpha_of(self, name: str) -> float:
        """The alpha for the module called ``name``."""
        patterns = self._matching('alpha_pattern', name)
        if patterns:
            return self.alpha_pattern[patterns[0]]
        return self.rank_of(name) if self.alpha is None else self.alpha

    def parameters_of(self, name: str) -> tuple[str, ...]:
        """The ``target_parameters`` that match the parameter called ``name``."""
        return self._matching('target_parameters', name)

    def _matching(self, key: str, name: str) -> tuple[str, ...]:
        """The patterns of that key that match a name, in their order."""
        patterns = tuple(getattr(self, key))
        if key not in self._known or self._known[key].patterns != patterns:
            self._known[key] = Patterns(patterns, self._most_steps)
        return self._known[key].matching(name)

    def to_json(self) -> str:
        """The configuration as one line of JSON, for the metadata of an adapter file."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LoRAConfig:
        """The inverse of :meth:`to_json`, for text from anywhere.

        Raises:
            InputError: As :meth:`from_dict` does; or the text is no JSON of a mapping, or a pattern may take for ever.
        """
        try:
            options = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError('The configuration of LoRA is not valid JSON.') from None
        if not isinstance(options, dict):
            raise InputError(f'The configuration of LoRA must be a mapping, got {shown(repr(options))}.')
        for value in options.values():
            for pattern in value if isinstance(value, (list, dict)) else [value]:
                if isinstance(pattern, str):
                    check_simple(pattern)
        config = cls.from_dict(options)
        config._most_steps = MOST_STEPS
        return config

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> LoRAConfig:
        """A configuration from a mapping, e.g. a section of an option file.

        Raises:
            InputError: An unknown key (with the known ones that look like it), or a wrong value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f'did you mean "{near[0]}"?' if near else f'known keys are {", ".join(known)}.'
                raise InputError(f'Unknown LoRA option "{shown(str(key))}": {hint}')
        return cls(**options)
