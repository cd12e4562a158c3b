"""What a file may state of the network of its run: nobody who opens a file has written it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from lora_sr.archs import AdaptSR
from lora_sr.checkpoints.building import find_known
from lora_sr.checkpoints.sections import base_section
from lora_sr.checkpoints.stock import check_swinir
from lora_sr.errors import InputError, shown

MOST_ARGUMENTS, LONGEST_TEXT = 1000, 80
PATH = re.compile(r'[/\\]|\.[A-Za-z]')
LARGEST_SUM = 2**16  # of all numbers: what a constructor makes of them need not be parameters, which are counted
SWINIR = 'SwinIR'
REMEDY = 'an option file, named with -opt, may say more'
# BasicSR's networks that read files when they are made, and such that take no image or give none.
OF_OTHER_THINGS = (
    *('BasicVSR', 'BasicVSRPlusPlus', 'DFDNet', 'DUF', 'EDVR', 'IconVSR', 'SpyNet', 'TOFlow', 'VGGFeatureExtractor'),
    *('HiFaceGANDiscriminator', 'StyleGAN2Discriminator', 'UNetDiscriminatorSN', 'VGGStyleDiscriminator'),
    *('StyleGAN2Generator', 'StyleGAN2GeneratorBilinear', 'StyleGAN2GeneratorClean', 'StyleGAN2GeneratorCSFT'),
)


def check_stated(section: Mapping[str, Any], where: str) -> None:
    """Check the section of a network that a file states, before anything is built of it.

    An option file may say all that is refused here: its user has written it.

    Raises:
        InputError: It is no network that takes an image and gives an image, of which some of BasicSR read files; or it
            has values that are no plain ones, many, large, or paths.
    """
    section = base_section(section)
    _check_values(section, where)
    name = section.get('type')
    arch: Any = find_known(name)[0] if isinstance(name, str) else None
    if arch is None:
        return  # which is told where it is built
    is_stock = arch.__module__.startswith('basicsr.')
    if arch is AdaptSR or (is_stock and arch.__name__ in OF_OTHER_THINGS):
        raise InputError(f'{where}.type must be a network that takes an image and gives an image, got {name}')
    if is_stock and arch.__name__ == SWINIR:
        _check_swinir(arch, section, where)


def _check_values(section: Mapping[str, Any], where: str) -> None:
    """Check all values of a section, also those of its lists and sections."""
    values: list[tuple[Any, Any]] = list(section.items())
    total = 0.0
    for index, (key, value) in enumerate(values):  # which grow
        name = f'{where}.{shown(str(key), 40)}'
        if index >= MOST_ARGUMENTS:
            raise InputError(f'{where} must have at most {MOST_ARGUMENTS:,} values, got more')
        if isinstance(value, Mapping):
            values += islice(value.items(), MOST_ARGUMENTS + 1)
        elif isinstance(value, (list, tuple)):
            values += ((key, one) for one in islice(value, MOST_ARGUMENTS + 1))
        elif isinstance(value, str):
            if len(value) > LONGEST_TEXT or not value.isprintable() or PATH.search(value):
                raise InputError(f'{name} must be a word, and no path, got {shown(repr(value), 40)}; {REMEDY}')
        elif isinstance(value, (int, float)):
            total += abs(value) if abs(value) <= LARGEST_SUM else LARGEST_SUM + 1  # NaN is as large
            if total > LARGEST_SUM:
                raise InputError(
                    f'the numbers of {where} must add up to at most {LARGEST_SUM:,}, got more at '
                    f'{shown(str(key), 40)}; {REMEDY}'
                )
        elif value is not None:
            raise InputError(f'{name} must be a plain value, got a {type(value).__name__}')


def _check_swinir(arch: Any, section: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(arch).parameters
    window, size = (section.get(key, parameters[key].default) for key in ('window_size', 'img_size'))
    sides = [size, size] if isinstance(size, int) else size
    if (
        not isinstance(sides, (list, tuple))
        or len(sides) != 2
        or not all(isinstance(one, int) for one in (window, *sides))
    ):
        raise InputError(f'{where} must have integers for img_size and window_size, got {shown(repr([size, window]))}')
    try:
        check_swinir(window, *sides)
    except InputError as error:
        raise InputError(f'{where}: {error}') from None
