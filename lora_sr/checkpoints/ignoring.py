"""Files in torch's format in which trainers keep more than tensors: options, numbers of numpy, paths.

torch refuses such a file as a whole, so that nothing in it is run. Here each value of another class gets a stand-in,
which does nothing and holds nothing, and the tensors beside it are read.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO

import torch

from lora_sr.checkpoints.archive import MAGIC

MOST_CLASSES = 64
MOST_TRIES, MOST_TRIES_OF_OLD = 8, 64  # files from before torch 1.6 tell one class at each, and none is read for it
REFUSED = re.compile(r'Unsupported global: GLOBAL ([\w.]+)')
FILLED = re.compile(r'Can only SETITEMS? for .*\.Ignored(\d+)')


class Ignored(list):  # type: ignore[type-arg]  # torch fills nothing but lists and dictionaries
    """Stands for a value of a class that is not run; ``name`` is the class."""

    name = ''

    @property
    def is_array(self) -> bool:
        """Whether it stands for an array of numpy, which may be meant as a weight."""
        return self.name.startswith('numpy.') and self.name.endswith('._reconstruct')

    def __new__(cls, *_: Any, **__: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Take an item, and forget it."""

    def extend(self, _: Any) -> None:
        """Take items, and forget them."""


class Filled:
    """Stands for a class of dictionaries, of which torch fills its own alone."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def load_values(file: BinaryIO) -> Any:
    """What :func:`torch.load` reads of a file with ``weights_only=True``, on the CPU; the rest is :class:`Ignored`.

    Args:
        file: The file, at its beginning.

    Raises:
        Exception: What torch raises for a file that is damaged, that names modules of the system, or whose other
            values are built in unusual ways. Before torch 2.6, whatever has other values.
    """
    names: list[str] = []
    filled: set[int] = set()  # stands for classes that are dictionaries
    is_archive = file.read(len(MAGIC)) == MAGIC
    for _ in range(MOST_TRIES if is_archive else MOST_TRIES_OF_OLD):
        file.seek(0)
        stand_ins = [
            (Filled if index in filled else type(f'Ignored{index}', (Ignored,), {'name': name}), name)
            for index, name in enumerate(names)
        ]
        try:
            if not stand_ins:
                return torch.load(file, map_location='cpu', weights_only=True)
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
                return torch.load(file, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            other, dictionary = REFUSED.search(str(error)), FILLED.search(str(error))
            if dictionary is not None and int(dictionary[1]) not in filled:
                filled.add(int(dictionary[1]))
                continue
            if other is None or not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
                raise
            # torch tells of Python's own without their module.
            found = _others(file) or [other[1] if '.' in other[1] else f'builtins.{other[1]}']
            new = [name for name in found if name not in names]
            if not new or len(names) + len(new) > MOST_CLASSES:
                raise
            names += new
    raise pickle.UnpicklingError('it has values of too many classes')


def _others(file: BinaryIO) -> list[str]:
    """The classes of other values in an archive; none where they cannot be told beforehand."""
    file.seek(0)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # of a file from before torch 1.6, or a damaged one
        return []
