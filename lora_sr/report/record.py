"""``adapt.json``, the record of an adaptation, read and checked: it may come from anywhere, and be of a run at work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_sr.adapted_folder import RECORD
from lora_sr.errors import InputError, in_a_line
from lora_sr.files import check_regular


@dataclass(frozen=True)
class Request:
    """What was asked for; paths as ``lora-sr adapt`` noted them."""

    network: str
    options: str | None
    imports: tuple[str, ...]
    param_key: str | None
    hr: str | None
    lr: str | None
    teacher: str | None
    minutes: float
    share: float | None
    align: bool
    adapter: str | None


@dataclass(frozen=True)
class Lies:
    """How the LR image of a pair lies on its HR image: shift in LR pixels, color of 255, correlation."""

    shift: tuple[float, float]
    color: float
    correlation: float


@dataclass(frozen=True)
class PairsFound:
    """What the look at the pairs gave, and what followed for the training."""

    used: int
    left_out: tuple[str, ...]
    shift: tuple[float, float]
    color: float
    notes: tuple[str, ...]
    pairs: Mapping[str, Lies]
    training: int
    held: tuple[str, ...]
    rank: int
    also_train: tuple[str, ...]
    trained_parameters: int
    parameters: int
    batch: int
    side: int


@dataclass(frozen=True)
class Psnr:
    """Means over the pairs held back, in dB."""

    camera: float
    clean: float


@dataclass(frozen=True)
class Rates:
    """Of the test of learning rates; ``None`` stands for a training that diverged."""

    psnr: Mapping[float, float | None]
    steps: int
    best: float
    rate: float | None  # that was trained with


@dataclass(frozen=True)
class Training:
    """Of the training: {iteration: PSNR in dB}, the last iteration, and why it ended."""

    psnr: Mapping[int, float]
    iterations: int
    ended: str


@dataclass(frozen=True)
class Result:
    """What it came to."""

    strength: float
    gain: float
    has_gained: bool
    sentence: str


@dataclass(frozen=True)
class Record:
    """An adaptation; ``None`` and empty for the steps that are not done."""

    request: Request
    seconds: float
    pairs: PairsFound | None
    start: Psnr | None
    bicubic: Psnr | None
    rates: Rates | None
    training: Training | None
    strengths: Mapping[float, Psnr]
    result: Result | None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record of a folder.

        Raises:
            InputError: It cannot be read, or is none.
        """
        path = folder / RECORD
        check_regular(path, 'the record')
        try:
            content = json.loads(path.read_text('utf-8'))
            return cls._of(content['request'], content['seconds'], content['steps'])
        except OSError as error:
            raise InputError(f'The record {path} cannot be read: {error.strerror}.') from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = in_a_line(error)
            raise InputError(f'{path} must be a record of `lora-sr adapt`, got another file: {reason}.') from None

    @classmethod
    def _of(cls, request: dict[str, Any], seconds: Any, steps: dict[str, Any]) -> Record:
        start, rates, training, result = (steps.get(name) for name in ('start', 'rates', 'training', 'outcome'))
        return cls(
            _request(request),
            float(seconds),
            _pairs(steps['pairs']) if 'pairs' in steps else None,
            _psnr(start['start']) if start else None,
            _psnr(start['bicubic']) if start else None,
            _rates(rates, steps.get('plan')) if rates else None,
            _training(training) if training else None,
            {float(strength): _psnr(psnr) for strength, psnr in steps.get('strength', {}).items()},
            _result(result) if result else None,
        )


def _request(values: dict[str, Any]) -> Request:
    network, teacher = values['network'], values.get('teacher')
    return Request(
        str(network['checkpoint']),
        _text(network.get('options')),
        tuple(map(str, network.get('imports') or ())),
        _text(network.get('param_key')),
        _text(values.get('hr')),
        _text(values.get('lr')),
        None if teacher is None else str(teacher['checkpoint']),
        float(values['minutes']),
        None if values.get('share') is None else float(values['share']),
        bool(values.get('align')),
        _text(values.get('from')),
    )


def _pairs(values: dict[str, Any]) -> PairsFound:
    lora = values['lora']
    return PairsFound(
        int(values['used']),
        tuple(map(str, values['left_out'].values())),
        _vector(values['shift']),
        float(values['color']),
        tuple(map(str, values['notes'])),
        {
            str(name): Lies(_vector(one['shift']), float(one['color']), float(one['correlation']))
            for name, one in values['pairs'].items()
        },
        len(values['training']),
        tuple(map(str, values['held'])),
        int(lora['rank']),
        tuple(map(str, lora.get('also_train', ()))),
        int(values['trained_parameters']),
        int(values['parameters']),
        int(values['batch']),
        int(values['side']),
    )


def _rates(values: dict[str, Any], plan: dict[str, Any] | None) -> Rates:
    psnr = {float(rate): None if one is None else float(one) for rate, one in values['psnr'].items()}
    return Rates(psnr, int(values['steps']), float(values['best']), float(plan['rate']) if plan else None)


def _training(values: dict[str, Any]) -> Training:
    psnr = {int(iteration): float(one) for iteration, one in values['psnr'].items()}
    return Training(psnr, int(values['iterations']), str(values['ended']))


def _result(values: dict[str, Any]) -> Result:
    strength, gain = float(values['strength']), float(values['gain'])
    return Result(strength, gain, bool(values['has_gained']), str(values['sentence']))


def _psnr(values: dict[str, Any]) -> Psnr:
    return Psnr(float(values['camera']), float(values['clean']))


def _vector(values: Any) -> tuple[float, float]:
    x, y = values
    return float(x), float(y)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
