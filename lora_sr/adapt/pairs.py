"""The pairs of a camera: found, looked at, split by image, and written where training and validation read them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import cv2
import numpy as np

from lora_sr.data.lmdb_store import LmdbWriter
from lora_sr.data.registration import Registration, align, register
from lora_sr.data.sources import Source, find_sources, name_images, read_image
from lora_sr.errors import InputError

Item = TypeVar('Item')

SMALLEST_SIDE = 24  # LR pixels each way: of what is smaller no patch is cut
MOST_APART = 2  # LR pixels by which sizes may differ, and are trimmed
LEAST_ALIKE = 0.8  # correlation of LR and HR at their shift; those of one scene have more than 0.9
FURTHEST = 1.0  # LR pixels between the shift of a pair and that of most
SHIFT_TOLD, COLOR_TOLD = 0.25, 10.0  # LR pixels, of 255
FEWEST, FEW = 2, 10
HELD_SHARE, MOST_HELD = 0.1, 10
# Ten minutes draw some thousand patches: more images would make a run longer to begin, and no better.
MOST_PAIRS, MOST_PIXELS = 200, 10**9  # the latter of HR images, which are written uncompressed


@dataclass(frozen=True)
class Pair:
    """Two images of one scene.

    Attributes:
        name: The key of the HR image, without its suffix.
        hr: Its file.
        lr: The file of its LR image.
        size: (width, height) of the LR image as it is used.
        is_trimmed: Whether the sizes of the two differ by a pixel or two, which go at the right and at the bottom.
        registration: How the LR image lies on the HR image.
    """

    name: str
    hr: Path
    lr: Path
    size: tuple[int, int]
    is_trimmed: bool
    registration: Registration

    def read(self, scale: int, aligns: bool) -> tuple[np.ndarray, np.ndarray]:
        """HR and LR, BGR, of sizes that fit; put right if ``aligns``."""
        hr, lr, _ = _read(self.hr, self.lr, scale)
        return align(hr, lr, scale, self.registration) if aligns else (hr, lr)


@dataclass(frozen=True)
class Pairs:
    """What :func:`look_at_pairs` has found.

    Attributes:
        used: Those to train on and to hold back.
        left_out: {path of an image: why its pair is left out, in a sentence that names it}.
        shift: (x, y) in LR pixels, the median over the pairs.
        color: The median over the pairs of :attr:`Registration.color`, of 255.
        notes: Sentences on what the user should know.
    """

    used: tuple[Pair, ...]
    left_out: dict[str, str]
    shift: tuple[float, float]
    color: float
    notes: tuple[str, ...]

    def split(self) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """The pairs to train on, and a tenth of all to hold back: whole images, evenly spread, 1 to 10 of them."""
        count = len(self.used)
        held = min(MOST_HELD, math.ceil(count * HELD_SHARE))
        places = {(2 * number + 1) * count // (2 * held) for number in range(held)}
        train = tuple(pair for place, pair in enumerate(self.used) if place not in places)
        return train, tuple(pair for place, pair in enumerate(self.used) if place in places)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            'used': len(self.used),
            'left_out': self.left_out,
            'shift': [round(one, 3) for one in self.shift],
            'color': round(self.color, 2),
            'notes': list(self.notes),
            'pairs': {
                pair.name: {
                    'shift': [round(one, 3) for one in pair.registration.shift],
                    'color': round(pair.registration.color, 2),
                    'correlation': round(pair.registration.correlation, 4),
                }
                for pair in self.used
            },
        }


def look_at_pairs(
    hr_folder: str | os.PathLike[str],
    lr_folder: str | os.PathLike[str],
    scale: int,
    aligns: bool = False,
    is_captured: bool = True,
) -> Pairs:
    """Find the pairs of two folders, and look at each: whether it can be read, and how LR lies on HR.

    Pairs are by name, as for :func:`lora_sr.data.sources.find_sources`. Left out, and named, are images that cannot be
    read, have no partner or one of another size, are too small, or do not show what their partner shows, where most do.

    Args:
        hr_folder: HR images.
        lr_folder: LR images.
        scale: Scale factor of the network.
        aligns: Whether shifts and colors will be put right, and need no note.
        is_captured: Whether the LR images come from a camera. Those that were made of the HR images lie where they
            should, whatever noise and blur make of the measurement.

    Raises:
        InputError: A folder cannot be used, or fewer than two pairs can.
    """
    left_out: dict[str, str] = {}
    sources = find_sources([hr_folder], [scale], [lr_folder], misfits=left_out)
    total = len(sources) + len(left_out)
    sources = _evenly(sources, MOST_PAIRS)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looks = list(pool.map(lambda source: _look(source, scale, aligns), sources))
    faults = {str(source.hr): look for source, look in zip(sources, looks) if isinstance(look, InputError)}
    left_out.update((path, str(fault)) for path, fault in faults.items())
    pairs = [look for look in looks if isinstance(look, Pair)]
    if is_captured:
        left_out.update(_outliers(pairs))
    used = [pair for pair in pairs if str(pair.hr) not in left_out]
    pixels = sum(pair.size[0] * pair.size[1] * scale**2 for pair in used)
    used = _evenly(used, max(FEWEST, len(used) * MOST_PIXELS // max(1, pixels)))
    if len(used) < FEWEST:
        hints = {fault.hint if isinstance(fault, _Misfit) else '' for fault in faults.values()}
        if 1 < len(faults) == total and len(hints) == 1 and hints != {''}:  # one mistake, not so many
            raise InputError(f'{next(iter(left_out.values()))} It is the same with all {total} pairs.')
        if left_out:
            raise InputError(name_images(left_out.values(), total, 'cannot be used'))
        raise InputError(f'{hr_folder} must have at least {FEWEST} images, one of them to hold back, got {len(used)}.')
    x, y = (median(pair.registration.shift[axis] for pair in used) for axis in (0, 1))
    color = median(pair.registration.color for pair in used)
    notes = _notes(used, (x, y), color, aligns, is_captured)
    if total - len(left_out) > len(used):
        notes.insert(0, f'{len(used)} pairs of {total:,} are used, evenly spread: a short run draws no more of them.')
    return Pairs(tuple(used), dict(sorted(left_out.items())), (x, y), color, tuple(notes))


def _evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


def write_training_pairs(pairs: Sequence[Pair], folder: Path, scale: int, aligns: bool) -> tuple[Path, Path]:
    """Write pairs into the raw databases ``HR_raw.lmdb`` and ``LR_raw.lmdb``, which must not be there.

    Returns:
        The two.

    Raises:
        InputError: An image cannot be read any more.
        OSError, lmdb.Error: They cannot be written.
    """
    paths = folder / 'HR_raw.lmdb', folder / 'LR_raw.lmdb'
    writers = [LmdbWriter(path) for path in paths]
    try:
        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(pairs), workers):  # so that no more images are in memory
                some = pairs[start : start + workers]
                for pair, images in zip(some, pool.map(lambda pair: pair.read(scale, aligns), some)):
                    for writer, image in zip(writers, images):
                        writer.put_raw(pair.name, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        for writer in writers:
            writer.finish()
    finally:
        for writer in writers:
            writer.close()
    return paths


def _look(source: Source, scale: int, aligns: bool) -> Pair | InputError:
    """A pair that can be used, or why not."""
    lr_file = source.lr[scale]
    try:
        hr, lr, is_trimmed = _read(source.hr, lr_file, scale)
    except InputError as error:
        return error
    height, width = lr.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        return InputError(f'{lr_file} must have at least {SMALLEST_SIDE} pixels each way, got {width} x {height}.')
    registration = register(hr, lr, scale)
    if aligns:
        height, width = align(hr, lr, scale, registration)[1].shape[:2]
        if min(height, width) < SMALLEST_SIDE:
            return InputError(
                f'{lr_file} must have at least {SMALLEST_SIDE} pixels each way that {source.hr} shows as well, got '
                f'{width} x {height}.'
            )
    return Pair(source.key, source.hr, lr_file, (width, height), is_trimmed, registration)


def _read(hr_file: Path, lr_file: Path, scale: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """HR and LR, trimmed to sizes that fit, and whether they did not fit at once.

    Raises:
        InputError: One cannot be read, or their sizes are not those of a pair.
    """
    hr, lr = read_image(hr_file, deep=True), read_image(lr_file, deep=True)
    sizes = [(image.shape[0], image.shape[1]) for image in (hr, lr)]
    apart = max(abs(big - scale * small) for big, small in zip(*sizes))
    if apart > MOST_APART * scale:
        raise _misfit(hr_file, lr_file, scale, *sizes)
    height, width = (min(big // scale, small) for big, small in zip(*sizes))
    return hr[: height * scale, : width * scale], lr[:height, :width], apart >= scale


class _Misfit(InputError):
    """Two images are no pair; the hint says what may have been meant, if that can be told."""

    def __init__(self, message: str, hint: str):
        super().__init__(f'{message}{hint}.')
        self.hint = hint


def _misfit(hr_file: Path, lr_file: Path, scale: int, hr: tuple[int, int], lr: tuple[int, int]) -> _Misfit:
    """Why two images of these (height, width) are no pair."""
    wanted = f'{hr[1] // scale} x {hr[0] // scale}'
    got = f'{lr[1]} x {lr[0]}'
    ratio = hr[0] / lr[0]
    if hr == lr:
        hint = ', the same size: the network makes images larger'
    elif ratio < 1:
        hint = ', the larger one: HR and LR are the wrong way round'
    elif abs(ratio - round(ratio)) < 0.05 and abs(hr[1] / lr[1] - round(ratio)) < 0.05 and round(ratio) != scale:
        hint = f': they are a pair for x{round(ratio)}, and the network is for x{scale}'
    else:
        hint = ''
    wanted = f'must have {wanted} pixels (width x height), the size of {hr_file} by {scale}'
    return _Misfit(f'{lr_file} {wanted}, got {got}', hint)


def _outliers(pairs: Sequence[Pair]) -> dict[str, str]:
    """Those that show something else than their partner, or are shifted otherwise than most."""
    found = {}
    x, y = (median(pair.registration.shift[axis] for pair in pairs) if pairs else 0.0 for axis in (0, 1))
    for pair in pairs:
        registration = pair.registration
        away = max(abs(registration.shift[0] - x), abs(registration.shift[1] - y))
        if registration.correlation < LEAST_ALIKE:
            found[str(pair.hr)] = (
                f'{pair.lr} must show what {pair.hr} shows, got a correlation of {registration.correlation:.2f}.'
            )
        elif away > FURTHEST:
            found[str(pair.hr)] = (
                f'{pair.lr} must lie on {pair.hr} as the others do, got a shift of {_vector(registration.shift)} LR '
                f'pixels, where most have {_vector((x, y))}.'
            )
    return found


def _notes(
    used: Sequence[Pair], shift: tuple[float, float], color: float, aligns: bool, is_captured: bool
) -> list[str]:
    notes = []
    trimmed = sum(pair.is_trimmed for pair in used)
    if trimmed:
        notes.append(
            f'{trimmed} of {len(used)} pairs differ in size by a pixel or two, which go at the right and at the bottom.'
        )
    if len(used) < FEW:
        notes.append(f'{len(used)} pairs are few: what is learned of them may not hold for other images.')
    if is_captured and not aligns and max(map(abs, shift)) >= SHIFT_TOLD:
        notes.append(
            f'LR is shifted by {_vector(shift)} LR pixels, which the network would learn: --align undoes that.'
        )
    if is_captured and not aligns and color >= COLOR_TOLD:
        notes.append(
            f'Colors differ by {color:.0f} of 255, which the network would learn: --align gives HR the colors of LR.'
        )
    return notes


def _vector(shift: tuple[float, float]) -> str:
    return f'({shift[0]:.1f}, {shift[1]:.1f})'
