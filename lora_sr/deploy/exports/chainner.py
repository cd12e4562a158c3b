"""A network as a checkpoint that chaiNNer loads, proved by spandrel, which is what chaiNNer loads with."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_sr.archs import fold
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import NetworkLike, load_network
from lora_sr.checkpoints.families import is_for_chainner
from lora_sr.checkpoints.layouts import in_layout, layout_of
from lora_sr.checkpoints.writing import SUFFIXES, writing
from lora_sr.deploy.exports.deployed import FLOAT32_TOLERANCE, Deployed, ExportReport, deployed_network
from lora_sr.errors import InputError
from lora_sr.files import check_not_input, check_output

GAIN = 2  # factor of the inner channels of every Conv3XC, as spandrel builds them


def export_chainner(
    source: NetworkLike, output: str | os.PathLike[str], param_key: str | None = None, overwrite: bool = False
) -> ExportReport:
    """Write the deployed network of a checkpoint such that chaiNNer and spandrel recognize it.

    They know SPAN in its training form alone. So each 3x3 convolution is written back as branches that fold to it
    exactly: its kernel between two 1x1s that are identities, and a skip of zeros. Of the other networks they know
    SwinIR, RRDBNet with 32 growth channels, and SRVGGNetCompact with PReLU, which are written as they are, merged.

    The written file is loaded by spandrel and run on images of three sizes. Where spandrel is not installed, a SPAN is
    checked by our own loader instead, which folds the branches.

    Args:
        source: Whatever :func:`lora_sr.load_network` takes; LoRA is merged and branches folded.
        output: The file to write, ``.pth`` (state dict under ``params``) or ``.safetensors``.
        param_key: Where the state dict is in a file; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.
        overwrite: Replace ``output`` where it exists.

    Raises:
        InputError: The checkpoint cannot be used, or spandrel does not know its network, or is needed and not
            installed; ``output`` exists, has another suffix or cannot be written; or the file's images differ from the
            network's by more than 1e-4 of the range of values, or in their scale. No file is left behind then.
    """
    output = Path(output)
    check_output(output, SUFFIXES, overwrite)
    deployed = deployed_network(source, param_key)
    check_not_input(output, deployed.files)
    is_span = isinstance(deployed.network, SPAN)
    if is_span and deployed.network.norm and deployed.info.in_channels != 3:
        raise InputError(
            f'{deployed.name} cannot be exported for chaiNNer: a SPAN of {deployed.info.in_channels} channel must have '
            'norm: false there, got one that normalizes images.'
        )
    if not is_for_chainner(deployed.network):
        raise _unknown(deployed)
    has_spandrel = importlib.util.find_spec('spandrel') is not None
    if not is_span and not has_spandrel:
        raise InputError(
            f'{deployed.name} belongs to {deployed.family}, and whether chaiNNer loads that is for spandrel to say: '
            'pip install spandrel.'
        )
    state = in_layout(deployed.network.state_dict(), layout_of(deployed.network))
    with writing(as_branches(state) if is_span else state, output, deployed.origin) as partial:
        run = _load_by_spandrel(partial, deployed) if has_spandrel else fold(load_network(partial))
        difference = deployed.difference(run)
        if not difference.largest <= FLOAT32_TOLERANCE:
            raise InputError(
                f"{deployed.name} cannot be exported for chaiNNer: its images differ from the network's by "
                f'{difference}.'
            )
    form = 'SPAN in training form, of exact branches' if is_span else 'checkpoint, merged'
    return ExportReport(deployed, form, difference, 'spandrel' if has_spandrel else 'lora_sr')


@torch.no_grad()
def as_branches(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a SPAN in deploy form as one of its training form, with the deploy form beside.

    Every sum that folds the branches has one term that is not zero, so in any precision they fold to the same kernel.
    """
    branches = {}
    for key, value in state.items():
        name, _, tensor = key.rpartition('.eval_conv.')
        if tensor == 'weight':
            outputs, inputs = value.shape[:2]
            kernel = value.new_zeros(GAIN * outputs, GAIN * inputs, *value.shape[2:])
            kernel[:outputs, :inputs] = value
            first = torch.eye(GAIN * inputs, inputs).to(value)[:, :, None, None]
            last = torch.eye(outputs, GAIN * outputs).to(value)[:, :, None, None]
            branches[f'{name}.sk.weight'] = value.new_zeros(outputs, inputs, 1, 1)
            branches[f'{name}.sk.bias'] = value.new_zeros(outputs)
            for i, weight in enumerate((first, kernel, last)):
                branches[f'{name}.conv.{i}.weight'] = weight
                branches[f'{name}.conv.{i}.bias'] = value.new_zeros(len(weight))
            branches[f'{name}.conv.2.bias'] = state[f'{name}.eval_conv.bias']
        branches[key] = value
    return branches


def _load_by_spandrel(partial: Path, deployed: Deployed) -> Callable[[Tensor], Tensor]:
    import spandrel

    try:
        descriptor = spandrel.ModelLoader(device='cpu').load_from_file(partial)
    except Exception as error:  # whatever it makes of a checkpoint that looks like one of its networks
        raise _unknown(deployed) from error
    if descriptor.scale != deployed.info.scale:
        raise InputError(
            f'{deployed.name} cannot be exported for chaiNNer: it is of scale {deployed.info.scale}, and spandrel '
            f'{spandrel.__version__} takes it for one of scale {descriptor.scale}.'
        )
    descriptor.eval()

    def run(images: Tensor) -> Tensor:  # as spandrel does, but for its clipping: one at a time, in a copy
        return torch.cat([descriptor._call_fn(descriptor.model, image.clone()) for image in torch.split(images, 1)])

    return run


def _unknown(deployed: Deployed) -> InputError:
    return InputError(
        f'{deployed.name} cannot be exported for chaiNNer: spandrel, which loads for it, knows no {deployed.family} of '
        'these sizes; chaiNNer also runs what `lora-sr export onnx` writes.'
    )
