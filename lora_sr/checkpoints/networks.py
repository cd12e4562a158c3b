"""The one way in: from what a user names to a network."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

from torch import Tensor, nn

from lora_sr.adapters import (
    adapted_modules,
    infer_lora_config,
    load_adapter,
    mix_adapters,
    only_lora,
    remove_lora,
)
from lora_sr.adapters.foreign_files import weights_file
from lora_sr.adapters.verbs import attach_updates
from lora_sr.archs import deploy_form, fold, is_training_form, network_info, take_any_size
from lora_sr.checkpoints.adapter_file import AdapterFile, check_once, fitted
from lora_sr.checkpoints.bounds import bounded
from lora_sr.checkpoints.building import build_network, without_old_calls
from lora_sr.checkpoints.checkpoint import ADAPTED, ADAPTER, Checkpoint
from lora_sr.checkpoints.community import build_community
from lora_sr.checkpoints.content import DamagedWeights, key_in, load_weights, read_checkpoint
from lora_sr.checkpoints.families import FAMILIES, OURS, discriminator_of
from lora_sr.checkpoints.imports import import_modules
from lora_sr.checkpoints.layouts import layout_of, set_layout
from lora_sr.checkpoints.nearest import nearest_family
from lora_sr.checkpoints.origin import Origin
from lora_sr.checkpoints.sections import BY_FILE, base_section, names_file
from lora_sr.checkpoints.stated import check_stated
from lora_sr.errors import InputError, MissingBasicSR, shown
from lora_sr.option_file import load_options

LOG = logging.getLogger('lora_sr')

PathLike = Union[str, 'os.PathLike[str]']
OPTION_SUFFIXES = ('.yml', '.yaml')
LARGEST_SCALE = 64
SHOWN = 40  # letters of a key
# How many times the values of a file a network may have: a base and its adapted form; branches of what is folded.
FAMILY_FACTOR, SECTION_FACTOR = 2, 16


@dataclass(frozen=True)
class NetworkSource:
    """What names a network: a checkpoint, and what it takes to make a network of it.

    Args:
        checkpoint: A checkpoint file, or one that has been read; an option file; or a live network, which is used as
            it is. ``None`` stands for the checkpoint that ``options`` names.
        options: An option file whose ``network_g`` the checkpoint belongs to. Without it the checkpoint tells its
            family by its keys, or its network by what its run has written into it.
        imports: Modules to import first, see :func:`lora_sr.checkpoints.imports.import_modules`.
        adapters: Adapter files, each with its weight, to put on top; see :func:`lora_sr.adapters.mix_adapters`.
        param_key: Where the state dict is in the checkpoint; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        force: Put adapters on a base that is not the one that they were trained on.
    """

    checkpoint: PathLike | Checkpoint | nn.Module | None = None
    options: PathLike | None = None
    imports: Sequence[str] = ()
    adapters: Sequence[tuple[PathLike, float]] = ()
    param_key: str | None = None
    force: bool = False


NetworkLike = Union[PathLike, Checkpoint, nn.Module, NetworkSource]


@dataclass(frozen=True)
class OpenedNetwork:
    """A network, and where it was found.

    Args:
        network: On the CPU and in eval mode unless it was live; it takes images of any size where it can.
        name: What to call it in a message: the file, or the class of a live network.
        checkpoint: The file of its weights; ``None`` for a live network, or where there are no weights.
        section: The section ``network_g`` of which it was built; ``None`` where the keys of the file tell the family.
        origin: Where it comes from, adapters on top included.
        has_adapters: Whether its LoRA is that of adapter files, which the origin names.
    """

    network: nn.Module
    name: str
    checkpoint: Checkpoint | None
    section: Mapping[str, Any] | None
    origin: Origin
    has_adapters: bool = False

    @property
    def base(self) -> dict[str, Any] | None:
        """The section of an option file that describes the base; ``None`` for a live network, which nothing describes.

        The files of spandrel's architectures describe themselves.
        """
        if self.section is not None:
            return dict(base_section(self.section))
        checkpoint = self.checkpoint
        if checkpoint is not None and checkpoint.family is not None:
            return {'type': checkpoint.family, **FAMILIES[checkpoint.family].arguments(checkpoint.state)}
        if checkpoint is not None and checkpoint.architecture is not None:
            return {'type': BY_FILE, 'path': os.fspath(checkpoint.path)}
        return None

    @property
    def arguments(self) -> dict[str, Any] | None:
        """The arguments with which the class of the base was built; ``None`` where they are not known."""
        base = self.base
        if base is None or base['type'] == BY_FILE:
            return None
        return {key: value for key, value in base.items() if key != 'type'}


class UnknownNetwork(InputError):
    """A file of weights cannot be made a network: no family knows it, or it only looks like one that does.

    ``checkpoint`` is the file, which has been read.
    """

    def __init__(self, message: str, checkpoint: Checkpoint):
        super().__init__(message)
        self.checkpoint = checkpoint


def load_network(source: NetworkLike, param_key: str | None = None) -> nn.Module:
    """Build the network that a checkpoint belongs to and load it; its hyperparameters come from names and shapes.

    Base, training-form, adapted and merged checkpoints are told apart by their keys. An adapted one gives a network
    whose LoRA layers have the ranks and alphas of the file. The network takes images of any size, see
    :func:`lora_sr.archs.take_any_size`, except for SwinIR with an absolute position embedding, which has one size.

    What no tensor shows is taken to be as in the published checkpoints:

    - LKDN: a file of the authors' code with ``BSConvU_idt`` has the names and shapes of one with ``BSConvU``, and is
      taken for that, whose output differs.
    - SwinIR: ``img_range`` is 255 for windows of 7 without an upsampler (JPEG artifacts), else 1; no ``qk_scale``.
    - EDSR: ``res_scale`` is 0.1 from 256 channels on (EDSR-L), else 1 (EDSR-M).
    - RCAN: ``res_scale`` is 1. EDSR and RCAN: ``img_range`` is 255, ``rgb_mean`` that of DIV2K.
    - SRVGGNetCompact and ECBSR: activations without weights are ``relu``. ECBSR: ``with_idt`` is off.
    - RIDNet, as published, takes and gives values from 0 to 255, and all others from 0 to 1.

    A file of a network that was built otherwise gives other images then, without an error. Name its option file then:
    ``load_network(NetworkSource(path, options='train.yml'))``.

    Args:
        source: A checkpoint file; an option file that names one; a live network, which is given back; or a
            :class:`NetworkSource`.
        param_key: Where the state dict is in the file; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        InputError: A file cannot be read, or belongs to no known network, or does not fit it.
    """
    return open_network(source, param_key).network


def open_network(source: NetworkLike, param_key: str | None = None, needs_weights: bool = True) -> OpenedNetwork:
    """What :func:`load_network` does, with what was found on the way.

    Args:
        source: See :func:`load_network`.
        param_key: See :func:`load_network`.
        needs_weights: Refuse an option file that names no weights; else its network has the random ones of a new run.

    Raises:
        InputError: As :func:`load_network`; or an adapter does not fit, or was trained on another base.
    """
    if not isinstance(source, NetworkSource):
        source = NetworkSource(source, param_key=param_key)
    elif param_key is not None:
        source = replace(source, param_key=param_key)
    import_modules(source.imports)
    named, options = source.checkpoint, source.options
    if isinstance(named, (str, os.PathLike)) and Path(named).suffix in OPTION_SUFFIXES:
        named, options = None, named
    if isinstance(named, nn.Module):
        opened = OpenedNetwork(named, type(named).__name__, None, None, Origin())
    elif options is not None:
        opened = _open_by_options(named, options, source.param_key, needs_weights)
    elif named is not None:
        opened = open_checkpoint(_read(named, source.param_key))
    else:
        raise InputError('No network is named: give a checkpoint, or an option file with -opt.')
    return _with_adapters(opened, source) if source.adapters else opened


def input_files(source: NetworkLike, checkpoint: Checkpoint | None) -> list[PathLike]:
    """The files that a network was made of: its checkpoint, if there is one, and its adapters."""
    adapters: list[PathLike] = (
        [weights_file(path) for path, _ in source.adapters] if isinstance(source, NetworkSource) else []
    )
    return adapters if checkpoint is None else [checkpoint.path, *adapters]


def _read(named: PathLike | Checkpoint, param_key: str | None, or_params: bool = False) -> Checkpoint:
    """The file that is named; with ``or_params`` its ``param_key`` is what a run takes for it."""
    if isinstance(named, Checkpoint):
        return named if param_key is None else Checkpoint.of(named.path, named.content, param_key)
    path = os.path.expanduser(named)
    content = read_checkpoint(path)
    return Checkpoint.of(path, content, key_in(content, param_key) if or_params else param_key)


def reopen(opened: OpenedNetwork, path: PathLike) -> nn.Module:
    """The network of ``opened`` again, with the weights of another file: what was merged, say.

    Raises:
        InputError: As :func:`load_network`.
    """
    checkpoint = Checkpoint.read(path)
    if opened.section is not None:
        return _open_by_section(checkpoint, opened.section, 'network_g').network
    if opened.checkpoint is not None:
        return open_checkpoint(checkpoint).network
    network = deploy_form(opened.network)
    load_weights(network, checkpoint.state, path)
    return network


def open_checkpoint(checkpoint: Checkpoint) -> OpenedNetwork:
    """:func:`open_network` for a file that has been read.

    Raises:
        InputError: It is an adapter.
        UnknownNetwork: It belongs to no known network.
    """
    path, state, origin = checkpoint.path, checkpoint.state, checkpoint.origin
    if checkpoint.form == ADAPTER:
        raise InputError(f'{path} is an adapter, not a network: put it onto its base with `lora-sr adapter merge`.')
    # Of networks that are not ours the keys do not tell everything; what their run has written down does.
    stated = None if origin is None or checkpoint.family in OURS else origin.network
    if stated is not None and not names_file(stated):
        try:
            check_stated(stated, 'network_g')
            with bounded(state, SECTION_FACTOR):
                return _open_by_section(checkpoint, stated, 'network_g')
        except DamagedWeights:
            raise
        except InputError as error:
            if checkpoint.family is None and checkpoint.architecture is None:
                raise UnknownNetwork(f'{path} names the network of its run, but {error}', checkpoint) from None
            LOG.warning(
                f'{path} names the network of its run, but {str(error).rstrip(".")}. It is taken for the '
                f'{checkpoint.family or checkpoint.architecture} of its shapes, which tell no residual scale and the '
                'like.'
            )
    if checkpoint.architecture is not None:
        return _open_community(checkpoint)
    if checkpoint.family is None:
        discriminator = discriminator_of(state)
        if discriminator is not None:
            raise UnknownNetwork(
                f'{path} must be a network that gives images, got a discriminator ({discriminator}): give its '
                'generator.',
                checkpoint,
            )
        near = nearest_family(state)
        raise UnknownNetwork(
            f'{path} belongs to no network known here: its first keys are '
            f'{", ".join(shown(key, SHOWN) for key in list(state)[:3])}'
            f'{"" if near is None else f"; the nearest is {near}"}. Name the option file of its network with -opt, and '
            'the module of a network of your own with --import.',
            checkpoint,
        )
    try:
        network = _built(checkpoint.family, state)
        if checkpoint.form == ADAPTED and not any(True for _ in adapted_modules(network)):
            attach_updates(network, infer_lora_config(state))
        return _loaded(network, checkpoint, None)
    except DamagedWeights:
        raise
    except MissingBasicSR as error:
        raise MissingBasicSR(f'{path} cannot be used: {error}') from None
    except KeyError as error:
        raise UnknownNetwork(f'{path} is incomplete: it lacks {shown(str(error.args[0]))}.', checkpoint) from None
    except InputError as error:
        raise UnknownNetwork(_about(path, error), checkpoint) from None


def _open_community(checkpoint: Checkpoint) -> OpenedNetwork:
    """The network of an architecture of spandrel, with LoRA where the file has it."""
    path, origin = checkpoint.path, checkpoint.origin or Origin()
    try:
        network = build_community(checkpoint.in_file, path)
        if checkpoint.form == ADAPTED:
            attach_updates(network, infer_lora_config(checkpoint.state))
        updates = only_lora(checkpoint.state)
        load_weights(network, {**network.state_dict(), **updates}, path)
    except DamagedWeights:
        raise
    except InputError as error:
        raise UnknownNetwork(_about(path, error), checkpoint) from None
    if checkpoint.layout:
        set_layout(network, checkpoint.layout)
    return OpenedNetwork(take_any_size(network), os.fspath(path), checkpoint, None, origin)


def _about(path: object, error: InputError) -> str:
    """What is wrong with a file, in a sentence that names it."""
    reason = str(error)
    return reason if reason.startswith(str(path)) else f'{path} cannot be used: {reason}'


def _built(family: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The network of a family for a state dict, whose names and shapes may be anything."""
    try:
        with bounded(state, FAMILY_FACTOR), without_old_calls():
            return FAMILIES[family].build(state)
    except (InputError, KeyError):
        raise
    except Exception as error:  # whatever a constructor makes of wrong sizes
        raise InputError(f'its names and shapes are those of no {family} ({type(error).__name__})') from error


def network_of_options(options: PathLike, imports: Sequence[str] = ()) -> nn.Module:
    """The network of an option file as a run builds it, without the weights that the file names.

    Raises:
        InputError: The file cannot be read, or its ``network_g`` cannot be built.
    """
    import_modules(imports)
    return take_any_size(build_network(_section_of(options, _load(options))).eval())


def _load(options: PathLike) -> dict[str, Any]:
    opt: dict[str, Any] = load_options(options)
    import_modules(opt.get('imports') or (), options)
    return opt


def _section_of(options: PathLike, opt: Mapping[str, Any]) -> Mapping[str, Any]:
    if 'network_g' not in opt:
        raise InputError(f'The option file {options} has no network_g.')
    section: Mapping[str, Any] = opt['network_g']
    return section


def _open_by_options(
    named: PathLike | Checkpoint | None, options: PathLike, param_key: str | None, needs_weights: bool
) -> OpenedNetwork:
    opt = _load(options)
    section = _section_of(options, opt)
    paths = opt['path'] if isinstance(opt.get('path'), Mapping) else {}
    where, strict, or_params = f'{options}: network_g', True, False
    if named is None and paths.get('pretrain_network_g') is not None:
        named = paths['pretrain_network_g']
        # As for any other file, its average comes first; a key that is written down counts.
        or_params = param_key is None
        param_key = param_key or paths.get('param_key_g')
        strict = paths.get('strict_load_g', True)
    elif named is None and needs_weights and names_file(section):
        build_network(section, where)  # which tells what is wrong with its keys, and with its file
        named = base_section(section)['path']
        param_key = param_key or base_section(section).get('param_key')
    if named is None:
        if needs_weights:
            raise InputError(f'{options} names no weights in path.pretrain_network_g: give a checkpoint beside it.')
        network = take_any_size(build_network(section).eval())
        return OpenedNetwork(network, os.fspath(options), None, section, Origin(network=dict(section)))
    return _open_by_section(_read(named, param_key, or_params), section, where, strict)


def _open_by_section(
    checkpoint: Checkpoint, section: Mapping[str, Any], where: str, strict: bool = True
) -> OpenedNetwork:
    """The network of a section with the weights of a file, and with LoRA where the file has it, with its ranks."""
    if checkpoint.form == ADAPTER:
        raise InputError(
            f'{checkpoint.path} is an adapter: give the checkpoint of its base, and put it on top with --adapter.'
        )
    network = build_network(base_section(section), where)
    remove_lora(network)
    checkpoint = checkpoint.of_network(network)
    if checkpoint.form == ADAPTED:
        try:
            attach_updates(network, infer_lora_config(checkpoint.state))
        except InputError as error:
            raise InputError(f'{checkpoint.path} does not fit {type(network).__name__}: {error}') from None
    return _loaded(network, checkpoint, section, strict)


def _loaded(
    network: nn.Module, checkpoint: Checkpoint, section: Mapping[str, Any] | None, strict: bool = True
) -> OpenedNetwork:
    try:
        load_weights(network, checkpoint.state, checkpoint.path)
    except InputError:
        is_other_form = is_training_form(network) and network.state_dict().keys() != checkpoint.state.keys()
        folded = fold(deepcopy(network)) if is_other_form else None
        if folded is not None and folded.state_dict().keys() == checkpoint.state.keys():  # a file of the deploy form
            load_weights(folded, checkpoint.state, checkpoint.path)
            network = folded
        elif strict:
            raise
        else:
            _load_some(network, checkpoint)
    if checkpoint.layout:
        set_layout(network, checkpoint.layout)
    origin = checkpoint.origin or Origin()
    if section is not None and origin.network is None:
        origin = replace(origin, network=dict(section))
    info = network_info(network.eval())
    if info is not None and info.scale > LARGEST_SCALE:
        raise InputError(
            f'{checkpoint.path} cannot be used: its scale must be at most {LARGEST_SCALE}, got {info.scale}.'
        )
    return OpenedNetwork(take_any_size(network), os.fspath(checkpoint.path), checkpoint, section, origin)


def _load_some(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load what fits, as ``strict_load_g: false`` asks for, and say what does not."""
    own, state = network.state_dict(), checkpoint.state
    fitting = [key for key in own if key in state and state[key].shape == own[key].shape]
    load_weights(network, state, checkpoint.path, strict=False)
    rest = [key for key in own if key not in fitting]
    if rest:
        LOG.warning(
            f'{checkpoint.path} gives {len(fitting)} of {len(own)} tensors of {type(network).__name__}; the others '
            f'stay random, {shown(rest[0])} among them.'
        )


def _with_adapters(opened: OpenedNetwork, source: NetworkSource) -> OpenedNetwork:
    network = deepcopy(opened.network) if opened.checkpoint is None else opened.network  # a live one stays as it is
    if any(True for _ in adapted_modules(network)):
        raise InputError(
            f'{opened.name} carries LoRA already, where adapters need a base: merge it with `lora-sr merge`.'
        )
    files = [AdapterFile.read(path) for path, _ in source.adapters]
    weights = [weight for _, weight in source.adapters]
    check_once(files, source.force)
    state, has_branches, layout = network.state_dict(), is_training_form(network), layout_of(network)
    content = None if opened.checkpoint is None else opened.checkpoint.content
    adapters = fitted(files, state, opened.origin, opened.name, has_branches, layout, content, source.force)
    load_adapter(network, mix_adapters(zip(adapters, weights)))
    origin = opened.origin.with_adapters(state, (file.fingerprint for file, weight in zip(files, weights) if weight))
    return replace(opened, network=network, origin=origin, has_adapters=True)
