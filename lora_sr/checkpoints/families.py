"""The families of networks that are known by their state dicts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_sr.archs.disp import DISP, disp_arguments, is_disp
from lora_sr.archs.dscf_fused import DSCFFused, dscf_fused_arguments, is_dscf_fused
from lora_sr.archs.dsclora import DSCLoRA, dsclora_arguments, is_dsclora
from lora_sr.archs.info import is_a
from lora_sr.archs.lkdn import LKDN, LKDN_S, is_lkdn, lkdn_arguments
from lora_sr.archs.span import SPAN, is_span, span_arguments
from lora_sr.archs.spanf import SPANF, is_spanf, spanf_arguments
from lora_sr.archs.spanv2 import SPANV2, is_spanv2, spanv2_arguments
from lora_sr.checkpoints.community import architecture_name
from lora_sr.checkpoints.stock import STOCK_NETWORKS

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Networks that are known by their state dicts.

    Args:
        recognize: Whether a state dict is of such a network.
        arguments: The arguments of its class for a state dict, in any form, as a section of an option file has them. It
            raises InputError where it has sizes that no network of the family has, and KeyError where a key is missing.
        network: Its class, or a function that imports it.
    """

    recognize: Callable[[State], bool]
    arguments: Callable[[State], dict[str, Any]]
    network: Callable[..., nn.Module]

    def build(self, state: State) -> nn.Module:
        """The network that a state dict belongs to, not loaded yet.

        Raises:
            InputError: As ``arguments``; or BasicSR, of which it is, is not installed.
            KeyError: As ``arguments``.
        """
        return self.network(**self.arguments(state))


# The first that recognizes a state dict counts.
_OWN = {
    'DSCLoRA': Family(is_dsclora, dsclora_arguments, DSCLoRA),
    'SPAN': Family(is_span, span_arguments, SPAN),
    'LKDN': Family(is_lkdn, lkdn_arguments, LKDN),
    'SPANF': Family(is_spanf, spanf_arguments, SPANF),
    'SPANV2': Family(is_spanv2, spanv2_arguments, SPANV2),
    'DISP': Family(is_disp, disp_arguments, DISP),
    'DSCFFused': Family(is_dscf_fused, dscf_fused_arguments, DSCFFused),
}
OURS = tuple(_OWN)
FAMILIES = {**_OWN, **{one.name: Family(one.recognize, one.arguments, one.construct) for one in STOCK_NETWORKS}}
# Discriminators of BasicSR -> keys by which they are told.
DISCRIMINATORS = {
    'UNetDiscriminatorSN': {'conv0.weight', 'conv1.weight_orig', 'conv8.weight_orig', 'conv9.weight'},
    'VGGStyleDiscriminator': {'conv0_0.weight', 'bn0_1.weight', 'linear1.weight', 'linear2.weight'},
    'StyleGAN2Discriminator': {'conv_body.0.0.weight', 'final_conv.0.weight', 'final_linear.1.weight'},
}
GROWTH = 32  # channels that each convolution of a dense block of RRDBNet adds, as spandrel builds them


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """The name of the network that a state dict belongs to, or ``None`` where no family knows it."""
    return next((name for name, family in FAMILIES.items() if family.recognize(state)), None)


def discriminator_of(state: Mapping[str, Tensor]) -> str | None:
    """The name of the discriminator of BasicSR that a state dict belongs to, or ``None``."""
    return next((name for name, keys in DISCRIMINATORS.items() if keys <= state.keys()), None)


def family_name(network: nn.Module) -> str:
    """What a network is called: ``LKDN-S`` where an LKDN has the sizes of that; a merged DSCLoRA is a ``SPAN``."""
    if isinstance(network, SPAN):
        return SPAN.__name__
    if isinstance(network, LKDN):
        small = inspect.signature(LKDN_S).parameters
        is_small = all(small[key].default == value for key, value in network.sizes.items())
        return 'LKDN-S' if is_small else 'LKDN'
    return architecture_name(network) or type(network).__name__


def is_for_chainner(network: Any) -> bool:
    """Whether chaiNNer knows the deployed form of a network, but for unusual sizes, which spandrel tells."""
    if is_a(network, 'basicsr.archs.rrdbnet_arch.RRDBNet'):
        return bool(network.body[0].rdb1.conv1.out_channels == GROWTH)
    if is_a(network, 'basicsr.archs.srvgg_arch.SRVGGNetCompact'):
        return bool(network.act_type == 'prelu')
    if isinstance(network, SPAN):
        return network.num_in_ch == 3 or not network.norm
    return is_a(network, 'basicsr.archs.swinir_arch.SwinIR') or architecture_name(network) is not None
