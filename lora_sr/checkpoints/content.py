"""The content of checkpoint files, read without running code, and weights from it into networks."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from lora_sr.adapters import is_lora_key
from lora_sr.archs.info import is_a
from lora_sr.checkpoints.archive import check_archive
from lora_sr.checkpoints.bounds import check_content, check_plain
from lora_sr.checkpoints.ignoring import Ignored, load_values
from lora_sr.checkpoints.layouts import as_rrdbnet, in_layout, layout_of, set_layout
from lora_sr.checkpoints.origin import KEY, Origin
from lora_sr.checkpoints.unwrapping import find_weights
from lora_sr.errors import InputError, in_a_line, shown
from lora_sr.files import check_regular

LOG = logging.getLogger('basicsr')

PARAM_KEYS = ('params_ema', 'params')
SHOWN = 3  # tensors of another shape
BEGINNING = 64  # bytes, by which formats are told
OTHERS = {
    b'version https://git-lfs': 'a pointer of Git LFS, which `git lfs pull` replaces by the file',
    b'<': 'a web page, as a download that failed leaves it',
    b'{': 'a text in JSON',
    b'\x1f\x8b': 'a gzip archive',
    b'\x93NUMPY': 'an array of numpy',
    b'\x89HDF': 'an HDF5 file, as Keras writes it',
    b'GGUF': 'a GGUF file',
    b'7767517': 'the text of an ncnn network: give the checkpoint that it was made of',
    b'\x89PNG': 'a PNG image',
    b'\xff\xd8\xff': 'a JPEG image',
}
INDICES = 'relative_position_index'


class DamagedWeights(InputError):
    """Weights that fit their network, and that it cannot run with."""


class Content(dict[str, Any]):
    """What a file holds: of a ``.pth`` file whatever was saved, of a safetensors file its tensors by name.

    ``metadata`` is that of a safetensors file.
    """

    metadata: dict[str, str]

    def __init__(self, values: Mapping[str, Any], metadata: Mapping[str, str] | None = None):
        super().__init__(values)
        self.metadata = dict(metadata or {})

    @property
    def origin(self) -> Origin | None:
        """Where the file says that it comes from."""
        return Origin.parse(self.metadata.get(KEY, self.get(KEY)))


_remembered: dict[tuple[int, ...] | str, Content] | None = None  # by the file itself, and by its name


def remember() -> None:
    """Keep what is read from now on, and give it again to whoever reads the same file, until :func:`forget`.

    A run reads its checkpoints when its options are checked, for its networks, and for their averages. In between
    BasicSR moves away the folder of the last run of that name, from which this one may start.
    """
    global _remembered
    if _remembered is None:
        _remembered = {}


def forget() -> None:
    """Let go of what was read since :func:`remember`."""
    global _remembered
    _remembered = None


def read_checkpoint(path: str | os.PathLike[str]) -> Content:
    """Read a checkpoint or a training state onto the CPU, from torch's format (``weights_only=True``) or safetensors.

    Raises:
        InputError: The file is missing, is none, is damaged, or holds anything but tensors and plain values; see also
            :func:`lora_sr.checkpoints.archive.check_archive` and :func:`lora_sr.checkpoints.bounds.check_content`.
    """
    if _remembered is None:
        return _read(path)
    name = os.path.abspath(path)
    try:
        status = os.stat(path)
    except OSError:
        return _remembered[name] if name in _remembered else _read(path)  # which tells what is wrong
    key = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    if key not in _remembered:
        _remembered[key] = _read(path)
    _remembered[name] = _remembered[key]
    return _remembered[key]


def _read(path: str | os.PathLike[str]) -> Content:
    check_regular(path, 'the checkpoint')
    metadata = None
    try:
        with open(path, 'rb') as file:
            size, beginning = os.fstat(file.fileno()).st_size, file.read(BEGINNING)
            file.seek(0)
            if _is_safetensors(beginning, size):  # whatever its name
                content, metadata = _read_safetensors(path)
            else:
                _refuse_others(beginning, path)
                with warnings.catch_warnings():
                    check_archive(file, path)
                    file.seek(0)
                    warnings.simplefilter('ignore', UserWarning)  # of formats, which are read or refused in a sentence
                    content = load_values(file)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f'the checkpoint {path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # torch raises half a dozen types for a file that is none of its own
        if Path(path).suffix in ('.yml', '.yaml'):
            raise InputError(f'{path} is an option file, where a checkpoint is right') from error
        raise InputError(f'the checkpoint {path} is damaged, or holds more than tensors and plain values') from error
    check_plain(content, path)
    if isinstance(content, Ignored):
        raise InputError(
            f'the checkpoint {path} holds a pickled {shown(content.name)}, which is not run: its state dict has to be '
            'saved instead'
        )
    if not isinstance(content, dict):
        raise InputError(f'the checkpoint {path} holds a {type(content).__name__}, not a dictionary of tensors')
    check_content(content, path, size)
    return Content(content, metadata)


def _is_safetensors(beginning: bytes, size: int) -> bool:
    """Whether a file begins with the length of a header, and a header."""
    length = int.from_bytes(beginning[:8], 'little')
    return beginning[8:9] == b'{' and length <= size - 8


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    with contextlib.ExitStack() as stack:
        name = os.fspath(path)
        try:
            name.encode()
        except UnicodeEncodeError:  # safetensors takes text alone
            name = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), 'file')
            os.symlink(os.path.abspath(path), name)
        with safetensors.safe_open(name, framework='pt') as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def _refuse_others(beginning: bytes, path: object) -> None:
    """Name what is mistaken for a checkpoint, and is none.

    Raises:
        InputError: It is of another format.
    """
    kind = next((kind for start, kind in OTHERS.items() if beginning.startswith(start)), None)
    if kind is None and beginning[:1] == b'\x08' and beginning[2:3] in (b'\x12', b'\x1a', b'\x3a'):
        # A message of protobuf: the version of its format, then its producer, or its graph.
        kind = 'an ONNX model: give the checkpoint that it was made of'
    if not beginning:
        raise InputError(f'the checkpoint {path} is damaged: it is empty')
    if kind is not None:
        raise InputError(f'the checkpoint {path} must be in the format of torch or of safetensors, got {kind}')


def load_weights(
    net: nn.Module,
    content: Mapping[str, Any],
    path: object,
    param_key: str | None = None,
    strict: bool = True,
    tell_differences: Callable[[nn.Module, Mapping[str, Tensor], bool], None] | None = None,
) -> None:
    """Load weights into a network as BasicSR does, from where :func:`lora_sr.checkpoints.unwrapping.find_weights` finds
    them, and under the names that they have in the network.

    Args:
        net: The network.
        content: What :func:`read_checkpoint` gave, or a state dict.
        path: The file that it came from, for messages.
        param_key: Where the weights are in it. ``params`` and ``params_ema``, which BasicSR asks for by itself, are
            looked for elsewhere where they are not there or empty.
        strict: Whether all keys have to match.
        tell_differences: A function of the network, the weights and ``strict`` that logs where they differ.

    Raises:
        InputError: There are no such weights in ``content``, they do not fit, or are not finite.
    """
    weights, layout, param_key = weights_for(net, content, path, param_key)
    own = net.state_dict()
    _check_types(net, weights, path)
    if not strict and not any(key in own and own[key].shape == value.shape for key, value in weights.items()):
        raise InputError(f'{path} does not fit {type(net).__name__}: none of its tensors does.')
    if tell_differences is not None:
        LOG.info(f'Loading {type(net).__name__} model from {path}, with param key: [{param_key}].')
        tell_differences(net, weights, strict)
    elif not strict:
        for key in [key for key, value in weights.items() if key in own and own[key].shape != value.shape]:
            del weights[key]
    for name, value in own.items():
        # Follows from the size of a window. Another may be beyond the table, or another image without a word.
        if name.endswith(INDICES) and name in weights and weights[name].shape == value.shape:
            if not torch.equal(weights[name].to(value), value):
                raise DamagedWeights(
                    f'{path} is damaged: {shown(name)} must be that of {type(net).__name__}, got another.'
                )
    try:
        net.load_state_dict(weights, strict=strict)
    except (RuntimeError, KeyError) as error:  # the latter of branches that are to be folded, and are not all there
        reason = misfit(net, weights) or in_a_line(error, 200)
        raise InputError(f'{path} does not fit {type(net).__name__}: {reason}') from error
    if layout:
        set_layout(net, layout)
    check_finite(net, weights, path)


def check_finite(net: nn.Module, loaded: Container[str], path: object) -> None:
    """Check the values that were loaded into a network, as they are there: its type may be too narrow for them.

    Raises:
        DamagedWeights: Some are not finite.
    """
    parameters = dict(net.named_parameters())
    for name, value in net.state_dict().items():
        # A mask, which is no parameter, may be infinite.
        is_bad = not torch.isfinite(value).all() if name in parameters else torch.isnan(value).any()
        if name in loaded and is_bad:
            raise DamagedWeights(f'{path} holds values that are not finite: {name}.')


def _check_types(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> None:
    """Refuse what torch would convert without a word: integers to weights, and the real parts of complex numbers."""
    for name, value in net.named_parameters():
        dtype = weights[name].dtype if name in weights else value.dtype
        if not dtype.is_floating_point and dtype != value.dtype:
            raise InputError(f'{path} does not fit {type(net).__name__}: {name} must be {value.dtype}, got {dtype}.')


class Weights(NamedTuple):
    """What a file has for a network.

    Args:
        state: The weights, under the names that they have in the network.
        layout: Name in the network -> name in the file, of those that differ.
        param_key: Where they are in the file.
    """

    state: OrderedDict[str, Tensor]
    layout: dict[str, str]
    param_key: str | None


def key_in(content: Mapping[str, Any], param_key: str | None) -> str | None:
    """The section that a ``param_key`` of an option file means.

    That is ``None``, i.e. where the weights are found, if it is one that BasicSR asks for by itself and is not there.
    """
    is_there = param_key is not None and isinstance(content.get(param_key), Mapping) and bool(content[param_key])
    return None if param_key in PARAM_KEYS and not is_there else param_key


def weights_for(net: nn.Module, content: Mapping[str, Any], path: object, param_key: str | None = None) -> Weights:
    """Find the weights of a network in a file, as :func:`load_weights` does, which loads them.

    Raises:
        InputError: There are none.
    """
    own = net.state_dict()
    found = find_weights(content, path, key_in(content, param_key), lambda state: any(name in own for name in state))
    by_name = {old: new for new, old in layout_of(net).items()}
    if by_name.keys() & found.state.keys():
        return Weights(in_layout(found.state, by_name), layout_of(net), found.param_key)
    modern = as_rrdbnet(found.state) if is_a(net, 'basicsr.archs.rrdbnet_arch.RRDBNet') else None
    if modern is not None:
        return Weights(*modern, found.param_key)
    origin = content.origin if isinstance(content, Content) else None  # a run's file has the names of the network
    return Weights(found.state, (origin and origin.layout) or {}, found.param_key)


def misfit(net: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """In which names and shapes weights are not those of a network, as a part of a sentence; empty where they are."""
    own = net.state_dict()
    has_lora = any(map(is_lora_key, weights))
    parts = [
        # A base checkpoint may lack every LoRA tensor of an adapted network.
        counted('missing', [key for key in own if key not in weights and (has_lora or not is_lora_key(key))]),
        counted('not known to it', [key for key in weights if key not in own]),
    ]
    others = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    for key in others[:SHOWN]:
        shape = shown(str(tuple(weights[key].shape)), 40)
        parts.append(f'{shown(key)} has shape {shape} instead of {tuple(own[key].shape)}')
    if len(others) > SHOWN:
        parts.append(f'{len(others) - SHOWN} more have other shapes')
    return ', '.join(filter(None, parts))


def counted(what: str, keys: Sequence[str]) -> str:
    """How many keys are so, and the first of them; empty where none is."""
    if not keys:
        return ''
    few = f'1 key is {what} ({shown(keys[0])})'
    return few if len(keys) == 1 else f'{len(keys):,} keys are {what} (the first is {shown(keys[0])})'
