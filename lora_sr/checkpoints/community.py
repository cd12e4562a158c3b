"""Networks of the community, of architectures that are not known here: spandrel recognizes and builds them.

Source: https://github.com/chaiNNer-org/spandrel, which is imported when such a network is met.
"""

from __future__ import annotations

import math
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_sr.adapters import without_lora
from lora_sr.archs.info import NetworkInfo, set_info
from lora_sr.checkpoints.bounds import bounded, check_numbers, little_memory
from lora_sr.checkpoints.content import DamagedWeights, check_finite, counted, misfit
from lora_sr.checkpoints.layouts import layout_of, set_layout
from lora_sr.errors import InputError, in_a_line, shown

ARCHITECTURE = '_spandrel_architecture'
# Architectures of which spandrel knows several layouts, and whether a state dict is in one that its network has not.
RENAMED: dict[str, Callable[[Mapping[str, Tensor]], bool]] = {
    'GRL': lambda state: any(name.startswith(('model.', 'model_g.')) for name in state),
    'SwinIR': lambda state: 'conv_first.1.weight' in state,
    'ESRGAN': lambda state: 'conv_first.weight' in state,
}
# Times the values in the file, and beside: masks and tables that follow from sizes. Those of GRL are 14 million.
FACTOR, MORE = 2, 2**25
MOST_LISTED = 1000  # values of a tensor that tell sizes
FEW_BYTES = 2**30  # beside, of what is made on the way
PURPOSES = ('SR', 'Restoration')
# Networks of other purposes, by what spandrel calls them: nothing in them is to be adapted to other images.
OTHERS = {'GFPGAN': 'FaceSR', 'RestoreFormer': 'FaceSR', 'LaMa': 'Inpainting'}


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """The name of the architecture of a state dict, with LoRA in it or without; ``None`` where spandrel knows none.

    Raises:
        InputError: spandrel is not installed.
    """
    base = without_lora(state)
    found = _find(base) if base else None
    return None if found is None else str(found.name)


def names_in_network(state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Name in the network -> name in its file, of all that the network takes of a state dict, where some differ.

    Returns:
        ``None`` where spandrel does not know the state dict, or changes no names.
    """
    base = without_lora(state)
    architecture = _find(base) if any(has_others(base) for has_others in RENAMED.values()) else None
    if architecture is None or architecture.id not in RENAMED or not RENAMED[architecture.id](base):
        return None
    try:
        network = build_community(base, 'a state dict')
    except InputError:  # which is told when it is opened
        return None
    layout = layout_of(network)
    names = {name: layout.get(name, name) for name in network.state_dict()}
    return {name: old for name, old in names.items() if old in base}


def architecture_name(network: nn.Module) -> str | None:
    """The name of the architecture of a network that :func:`build_community` gave; ``None`` for all others."""
    return cast('str | None', vars(network).get(ARCHITECTURE))


def build_community(state: Mapping[str, Tensor], path: object) -> nn.Module:
    """The network of a state dict that spandrel knows, loaded, on the CPU and in eval mode.

    Names that spandrel changes stay known, see :func:`lora_sr.checkpoints.layouts.layout_of`.

    Args:
        state: The state dict; LoRA in it is left out of account.
        path: Its file, for messages.

    Raises:
        InputError: The state dict fits no network of its architecture, or one that needs more than an image.
    """
    base = without_lora(state)
    architecture = _find(base)
    if architecture is None:
        raise InputError(f'{path} is of no architecture that spandrel knows.')
    _check_purpose(OTHERS.get(architecture.id, PURPOSES[0]), architecture, path)
    names: dict[int, str] = {}
    wrong: list[str] = []
    traced = _Given({name: _Traced.of(value, name, names, wrong) for name, value in base.items()})
    held = sum(value.numel() * value.element_size() for value in base.values())
    try:
        check_numbers(base)
        with bounded(base, FACTOR, MORE), little_memory(FEW_BYTES + 4 * held), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch.meshgrid and the like, which are spandrel's business
            with torch.device('cpu'):
                described = architecture.load(traced)
    except InputError as error:
        raise InputError(f'{path} cannot be used: {error}') from None
    except Exception as error:  # whatever a constructor makes of wrong names and shapes
        raise InputError(f'{path} {_reason(error, base, architecture)}.') from error
    if wrong:
        raise DamagedWeights(f'{path} is damaged: {wrong[0]}.')
    _check_purpose(described.purpose, architecture, path)
    network: nn.Module = described.model.eval()
    left = _left(base, traced, set(names.values()), network)
    if left:
        raise InputError(
            f'{path} does not fit the {architecture.name} of its names: {counted("not known to it", left)}.'
        )
    check_finite(network, network.state_dict(), path)
    _freeze_what_freezes_itself(network)
    _keep_buffers(network, base)
    _note_layout(network, names)
    requirements = described.size_requirements
    halves = ((torch.bfloat16, described.supports_bfloat16), (torch.float16, described.supports_half))
    unshuffled: Any = getattr(network, 'start_unshuffle', 1)
    windows = unshuffled * network.window_size if unshuffled > 1 else 1  # of SwinIR, which spandrel leaves out
    info = NetworkInfo(
        described.input_channels,
        described.output_channels,
        described.scale,
        math.lcm(requirements.multiple_of, windows),
        smallest=max(1, requirements.minimum),
        is_square=requirements.square,
        halves=tuple(dtype for dtype, is_supported in halves if is_supported),
    )
    _call_as_described(network, described._call_fn)
    set_info(network, info)
    setattr(network, ARCHITECTURE, str(architecture.name))
    return network


def _find(base: dict[str, Tensor]) -> Any:
    try:
        from spandrel import MAIN_REGISTRY
    except ImportError as error:
        raise InputError('spandrel, which recognizes networks that are not known here, is not installed.') from error
    for support in MAIN_REGISTRY.architectures('detection'):
        if support.detect(base):  # which looks at names
            return support.architecture
    return None


def _check_purpose(purpose: str, architecture: Any, path: object) -> None:
    if purpose not in PURPOSES:
        raise InputError(f'{path} is a {architecture.name}, for {purpose}, where SR and restoration are right.')


def _reason(error: Exception, base: Mapping[str, Tensor], architecture: Any) -> str:
    """Why a state dict is of no network, from what its constructor, or torch, made of it."""
    if isinstance(error, KeyError) and error.args and error.args[0] not in base:
        return f'is incomplete: it lacks {shown(str(error.args[0]))}'
    reason = in_a_line(error, 200).rstrip('.')
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is nn.Module.load_state_dict.__code__:
            network, weights = frame.f_locals['self'], frame.f_locals['state_dict']
            own = network.state_dict()
            in_file = {
                key if key in own else getattr(value, 'name_in_file', key): value for key, value in weights.items()
            }
            reason = misfit(network, in_file) or reason
    return f'does not fit the {architecture.name} of its names: {reason}'


def _left(base: Mapping[str, Tensor], given: _Given, copied: set[str], network: nn.Module) -> list[str]:
    """The names of a file that its network does not take, and should.

    It need not take what its architecture removes, nor tables that it makes by itself, nor what stands beside it in the
    file: where the names of a network have a prefix, others are of something else, as a discriminator is.
    """
    own = dict(network.named_buffers())
    prefix = os.path.commonprefix([*copied]).rpartition('.')[0]
    beside = {name for name in base if prefix and not name.startswith(f'{prefix}.')}
    tables = {name for name in base if name[len(prefix) :].lstrip('.') in own}
    return [name for name in base if name not in copied | given.removed | beside | tables]


class _Given(dict[str, Tensor]):
    """A state dict that notes which of its names an architecture removes."""

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__(state)
        self.removed: set[str] = set()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.removed.add(name)


class _Traced(Tensor):
    """A tensor of a file that notes into which parameter it is copied: whatever it was named on the way there."""

    name_in_file: str
    copied: dict[int, str]  # by the parameter, which lives as long as its network
    wrong: list[str]

    @classmethod
    def of(cls, value: Tensor, name: str, copied: dict[int, str], wrong: list[str]) -> _Traced:
        traced = value.as_subclass(cls)
        traced.name_in_file, traced.copied, traced.wrong = name, copied, wrong
        return traced

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what is asked for, with what no longer is a tensor of the file."""
        if getattr(func, '__name__', '') == 'tolist' and args[0].numel() > MOST_LISTED:
            raise InputError(f'{shown(args[0].name_in_file)} must have a few values, got {args[0].numel():,}')
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, '__name__', '') == 'copy_' and len(args) > 1 and isinstance(args[1], cls):
                target, source = args[:2]
                source.copied[id(target)] = source.name_in_file
                name = shown(source.name_in_file)
                # torch would convert these without a word, complex numbers to their real parts.
                if target.is_floating_point() and not source.is_floating_point():
                    source.wrong.append(f'{name} must be {target.dtype}, got {source.dtype}')
                # An index follows from the sizes of the network. Another may be beyond a table.
                elif target.numel() > 1 and not target.is_floating_point() and not torch.equal(target, source):
                    source.wrong.append(f'{name} must be that of its sizes, got another')
            return func(*args, **(kwargs or {}))


def _note_layout(network: nn.Module, names: Mapping[int, str]) -> None:
    own = network.state_dict(keep_vars=True)
    in_file = {name: names.get(id(value)) for name, value in own.items()}
    set_layout(network, {name: old for name, old in in_file.items() if old is not None and old != name})


def _freeze_what_freezes_itself(network: nn.Module) -> None:
    """Freeze the parameters of modules that set ``requires_grad`` on themselves, of which torch takes no notice.

    So do the means that RCAN and IPT take from images and add again.
    """
    for module in network.modules():
        if vars(module).get('requires_grad') is False:
            module.requires_grad_(False)


def _keep_buffers(network: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Let what a network saves hold the buffers that its file has: GRL tells the sizes of its windows by them alone."""
    for name in base.keys() & dict(network.named_buffers()).keys():
        module, _, buffer = name.rpartition('.')
        network.get_submodule(module)._non_persistent_buffers_set.discard(buffer)


def _call_as_described(network: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
    """Let a network take images and give images, as spandrel calls it, also where it does something before or behind.

    It calls networks with one image at a time, and some do not run with more, or are wrong: SeemoRe, DRUNet, IPT.
    """
    plain = type(network)
    is_plain = call.__module__.startswith('spandrel.__helpers')  # which calls the network

    class Described(plain):  # type: ignore[misc, valid-type]
        def forward(self, images: Tensor) -> Tensor:
            images = images.clone()  # RCAN writes into them
            bare = _Bare(self, plain)
            if len(images) == 1 or (is_plain and self.training):
                return call(bare, images)
            return torch.cat([call(bare, image) for image in torch.split(images, 1)])

    Described.__name__, Described.__qualname__, Described.__module__ = plain.__name__, plain.__qualname__, __name__
    network.__class__ = Described


class _Bare:
    """A network that is called as its own class does it."""

    def __init__(self, network: nn.Module, plain: type[nn.Module]):
        self.network, self.plain = network, plain

    def forward(self, *inputs: Any) -> Any:
        return self.plain.forward(self.network, *inputs)

    __call__ = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)
