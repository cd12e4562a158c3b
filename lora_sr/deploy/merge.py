"""From a trained checkpoint to the plain checkpoint that is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_sr.adapters import adapted_modules, count_parameters, is_lora_key, lora_layers, merge_state_dict
from lora_sr.archs import NetworkInfo, deploy_form, network_info
from lora_sr.archs.reparam import TOLERANCE, Foldable, relative_difference, run_seeded
from lora_sr.checkpoints import Checkpoint, NetworkLike, OpenedNetwork, Origin, open_network
from lora_sr.checkpoints.checkpoint import ADAPTED
from lora_sr.checkpoints.families import OURS
from lora_sr.checkpoints.layouts import in_layout, layout_of
from lora_sr.checkpoints.networks import UnknownNetwork, input_files, reopen
from lora_sr.checkpoints.origin import adapter_fingerprint
from lora_sr.checkpoints.sections import base_section, names_file
from lora_sr.checkpoints.writing import SUFFIXES, write_state, writing
from lora_sr.errors import InputError, in_a_line, shown
from lora_sr.files import check_not_input, check_output


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_checkpoint` did and measured; ``difference`` is relative to the largest output.

    Of a network that is not known here, ``network`` and ``difference`` are ``None``, and what counts as parameters are
    all values of the file, also those that are none, such as masks.
    """

    network: str | None
    layers: int
    folded: int
    lora_parameters: int
    trained_parameters: int
    plain_parameters: int
    difference: float | None

    def __str__(self) -> str:
        known = self.network is not None
        lora = f' ({self.lora_parameters:,} parameters, {self.lora_parameters / self.trained_parameters:.1%} of all)'
        difference = 'not measured, as an unknown network cannot be run'
        if self.difference is not None:
            difference = f'{self.difference:.1e} of the largest output (trained against written network)'
        elif known:
            difference = 'not measured, as it is not known which images the network takes'
        return (
            f'network               {self.network if known else "unknown here"}\n'
            f'layers with LoRA      {self.layers}{lora if self.layers else ""}\n'
            f'modules folded        {self.folded}\n'
            f'{"parameters    " if known else "values in file"}        '
            f'{self.trained_parameters:,} -> {self.plain_parameters:,}\n'
            f'largest difference    {difference}'
        )


def merge_checkpoint(
    source: NetworkLike, output: str | os.PathLike[str], param_key: str | None = None, overwrite: bool = False
) -> MergeReport:
    """Take a training checkpoint to its deploy form: merge the LoRA, then fold the reparameterized branches.

    Either may be absent. The written file is loaded again, into the stock network, and compared with the trained
    network on random images. Merging is exact to the bit, and is compared in float32, as it runs. Folding rounds
    differently, so there both networks are evaluated in float64, which leaves the rounding of the written weights.

    A checkpoint with LoRA of a network that is not known is merged without the network: each update is added to the
    weight that it stands beside. No outputs are compared then, and no branches folded.

    Args:
        source: A checkpoint with LoRA or with branches, or whatever else :func:`lora_sr.load_network` takes.
        output: The file to write, ``.pth`` (state dict under ``params``) or ``.safetensors``.
        param_key: Where the state dict is in the checkpoint; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        overwrite: Replace ``output`` where it exists.

    Raises:
        InputError: ``source`` cannot be read, or there is nothing to merge or fold; ``output`` exists, is an input, has
            another suffix or cannot be written; or the outputs differ by more than 1e-5 of the largest. No file is left
            behind then.
    """
    output = Path(output)
    check_output(output, SUFFIXES, overwrite)
    try:
        opened = open_network(source, param_key)
    except UnknownNetwork as error:
        # A network of one's own may look like a stock one; those of this package may have branches.
        if error.checkpoint.form != ADAPTED or error.checkpoint.family in OURS:
            raise
        check_not_input(output, input_files(source, error.checkpoint))
        return _merge_unknown(error.checkpoint, output)
    trained = opened.network
    check_not_input(output, input_files(source, opened.checkpoint))
    if opened.checkpoint is None:  # a live network stays as it is
        trained = deepcopy(trained).cpu().eval()
    layers = sum(1 for _ in lora_layers(trained))
    folded = sum(1 for module in trained.modules() if isinstance(module, Foldable) and module.is_training_form)
    if not any(True for _ in adapted_modules(trained)) and not folded:
        raise InputError(f'{opened.name} is a deploy-form checkpoint already: nothing to merge or fold.')
    try:
        plain = deploy_form(trained)
    except InputError as error:
        raise InputError(f'{opened.name} cannot be folded: {error}') from None

    state = in_layout(plain.state_dict(), layout_of(trained))
    with writing(state, output, merged_origin(opened)) as partial:
        written = reopen(opened, partial)
        # A network that a family knows runs, or fails as it would for any user.
        is_known = opened.checkpoint is not None and opened.checkpoint.is_known
        dtype = torch.float64 if folded else torch.float32
        difference = _difference(trained, written, dtype) if is_known or network_info(trained) else None
        if difference is not None and not difference <= TOLERANCE:
            raise InputError(
                f'The written network differs from the trained one by {difference:.1e} of the largest output, more '
                f'than {TOLERANCE:.0e}: {opened.name} has weights too large for float32, or NaN.'
            )
    before = count_parameters(trained)
    return MergeReport(
        network=type(written).__name__,
        layers=layers,
        folded=folded,
        lora_parameters=before.lora,
        trained_parameters=before.total,
        plain_parameters=count_parameters(written).total,
        difference=difference,
    )


def merged_origin(opened: OpenedNetwork) -> Origin:
    """Where the merged form of a network comes from."""
    origin, network = opened.origin, opened.origin.network
    state = opened.network.state_dict()
    # The tensors of files on top, once they are mixed or converted, have another fingerprint than the files.
    if any(map(is_lora_key, state)) and not opened.has_adapters:
        origin = _with_own_adapter(origin, state)
    origin = replace(origin, layout=None)
    if network is None or names_file(network):  # which need not be there
        return replace(origin, network=None)
    return replace(origin, network=dict(base_section(network)))


def _with_own_adapter(origin: Origin, state: Mapping[str, Tensor]) -> Origin:
    return origin.with_adapters(state, [adapter_fingerprint(state)])


def _merge_unknown(checkpoint: Checkpoint, output: Path) -> MergeReport:
    state = checkpoint.state
    try:
        merged = merge_state_dict(state)
    except InputError as error:
        raise InputError(f'{checkpoint.path} cannot be used: {error}') from None
    for key, value in merged.items():
        is_weight = value is not state[key] or key.endswith('.weight')
        if value.is_complex() or (is_weight and not value.is_floating_point()):
            raise InputError(f'{checkpoint.path} is damaged: {shown(key)} must be floating-point, got {value.dtype}.')
        if not value.isfinite().all() if is_weight else value.isnan().any():  # a mask may be infinite
            raise InputError(f'{checkpoint.path} has weights too large for float32, or NaN: {shown(key)}.')
    write_state(merged, output, _with_own_adapter(checkpoint.origin or Origin(), state))
    updates = [key for key in state if is_lora_key(key) and not key.endswith('lora_alpha')]
    return MergeReport(
        network=None,
        layers=sum(key.endswith('lora_A') for key in state),
        folded=0,
        lora_parameters=sum(state[key].numel() for key in updates),
        trained_parameters=sum(value.numel() for value in state.values()),
        plain_parameters=sum(value.numel() for value in merged.values()),
        difference=None,
    )


@torch.no_grad()
def _difference(trained: nn.Module, written: nn.Module, dtype: torch.dtype) -> float:
    info = network_info(trained) or NetworkInfo(3, 3, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, info.in_channels, *info.size(32, 40), generator=generator).to(dtype) * info.value_range
    try:
        return relative_difference(*(run_seeded(network.to(dtype), images) for network in (trained, written)))
    except (TypeError, IndexError) as error:  # of a constructor's values, which a file may state
        raise InputError(
            f'{type(trained).__name__} does not run with the values that it was built with: {in_a_line(error)}.'
        ) from error
