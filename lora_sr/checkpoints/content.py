"""The content of checkpoint files, read without running code, and weights from it into networks."""

from __future__ import annotations

import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from lora_sr.adapters import is_lora_key
from lora_sr.checkpoints.archive import check_archive
from lora_sr.checkpoints.bounds import check_content, check_plain
from lora_sr.checkpoints.origin import KEY, Origin
from lora_sr.errors import InputError, shown
from lora_sr.files import check_regular

LOG = logging.getLogger('basicsr')

PARAM_KEYS = ('params_ema', 'params')
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
        if os.fspath(path).endswith('.safetensors'):
            with safetensors.safe_open(os.fspath(path), framework='pt') as file:
                content, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
        else:
            with open(path, 'rb') as file, warnings.catch_warnings():
                check_archive(file, path)
                file.seek(0)
                warnings.simplefilter('ignore', UserWarning)  # of formats, which are read or refused in a sentence
                content = torch.load(file, map_location='cpu', weights_only=True)
        size = os.path.getsize(path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f'the checkpoint {path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # torch raises half a dozen types for a file that is none of its own
        if Path(path).suffix in ('.yml', '.yaml'):
            raise InputError(f'{path} is an option file, where a checkpoint is right') from error
        raise InputError(f'the checkpoint {path} is damaged, or holds more than tensors and plain values') from error
    check_plain(content, path)
    if not isinstance(content, dict):
        raise InputError(f'the checkpoint {path} holds a {type(content).__name__}, not a dictionary of tensors')
    check_content(content, path, size)
    return Content(content, metadata)


def load_weights(
    net: nn.Module,
    content: Mapping[str, Any],
    path: object,
    param_key: str | None = None,
    strict: bool = True,
    tell_differences: Callable[[nn.Module, Mapping[str, Tensor], bool], None] | None = None,
) -> None:
    """Load weights into a network as BasicSR does: from under ``param_key``, else ``params``; all of it if it is None.

    Args:
        net: The network.
        content: What :func:`read_checkpoint` gave, or a state dict.
        path: The file that it came from, for messages.
        param_key: Where the weights are in it.
        strict: Whether all keys have to match.
        tell_differences: A function of the network, the weights and ``strict`` that logs where they differ.

    Raises:
        InputError: There are no such weights in ``content``, they do not fit, or are not finite.
    """
    if param_key is not None:
        if param_key not in content and 'params' in content:
            param_key = 'params'
        if param_key not in content:
            raise InputError(
                f"{path} has no '{param_key}'; its keys begin with {', '.join(map(shown, list(content)[:3]))} "
                '(for a file of plain weights, set the param_key in the section path to ~)'
            )
        content = content[param_key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        there = [key for key in ('params', 'params_ema') if isinstance(content, dict) and key in content]
        hint = (
            f'; they are under {" and ".join(there)}, which the param_key in the section path has to name'
            if there
            else ''
        )
        raise InputError(f'{path} holds no weights {"at its top" if param_key is None else f"under {param_key}"}{hint}')
    weights = without_module_prefix(content, path)
    _check_types(net, weights, path)
    own = net.state_dict()
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
        misfit = _misfit(net, weights) or shown(' '.join(str(error).split()), 200)
        raise InputError(f'{path} does not fit {type(net).__name__}: {misfit}') from error
    parameters = dict(net.named_parameters())
    for name, value in net.state_dict().items():  # as they are in the network, whose type may be too narrow for them
        # A mask, which is no parameter, may be infinite.
        is_bad = not torch.isfinite(value).all() if name in parameters else torch.isnan(value).any()
        if name in weights and is_bad:
            raise DamagedWeights(f'{path} holds values that are not finite: {name}.')


def _check_types(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> None:
    """Refuse what torch would convert without a word: integers to weights, and the real parts of complex numbers."""
    for name, value in net.named_parameters():
        dtype = weights[name].dtype if name in weights else value.dtype
        if not dtype.is_floating_point and dtype != value.dtype:
            raise InputError(f'{path} does not fit {type(net).__name__}: {name} must be {value.dtype}, got {dtype}.')


def without_module_prefix(weights: Mapping[str, Tensor], path: object = 'a state dict') -> OrderedDict[str, Tensor]:
    """Weights on the CPU, without the ``module.`` that DataParallel puts before their names."""
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in weights.items():
        # Next to nothing is defined for float8.
        value = value.float() if value.element_size() == 1 and value.is_floating_point() else value
        name = key[len('module.') :] if key.startswith('module.') else key
        if name in renamed:
            raise InputError(f'{path} must have each name once, got {shown(name)} and module.{shown(name)}.')
        renamed[name] = value.detach().cpu()
    versions = getattr(weights, '_metadata', None)  # of the modules, which some of them look at when they load
    if isinstance(versions, Mapping):
        renamed._metadata = {  # type: ignore[attr-defined]
            name: {'version': value['version']}
            for name, value in versions.items()
            if isinstance(value, Mapping) and isinstance(value.get('version'), int)
        }
    return renamed


def _misfit(net: nn.Module, weights: Mapping[str, Tensor]) -> str:
    own = net.state_dict()
    has_lora = any(map(is_lora_key, weights))
    parts = []
    for what, keys in (
        # A base checkpoint may lack every LoRA tensor of an adapted network.
        ('missing', [key for key in own if key not in weights and (has_lora or not is_lora_key(key))]),
        ('not known to it', [key for key in weights if key not in own]),
    ):
        if keys:
            parts.append(f'{len(keys)} keys are {what} (the first is {shown(keys[0])})')
    for key in own:
        if key in weights and own[key].shape != weights[key].shape:
            shape = shown(str(tuple(weights[key].shape)), 40)
            parts.append(f'{shown(key)} has shape {shape} instead of {tuple(own[key].shape)}')
            break
    return ', '.join(parts)
