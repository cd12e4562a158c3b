"""The families of networks that are known by their state dicts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_sr.archs.disp import build_disp, is_disp
from lora_sr.archs.dscf_fused import build_dscf_fused, is_dscf_fused
from lora_sr.archs.dsclora import build_dsclora, is_dsclora
from lora_sr.archs.info import is_a
from lora_sr.archs.lkdn import LKDN, LKDN_S, build_lkdn, is_lkdn
from lora_sr.archs.span import SPAN, build_span, is_span
from lora_sr.archs.spanf import build_spanf, is_spanf
from lora_sr.archs.spanv2 import build_spanv2, is_spanv2
from lora_sr.checkpoints.community import architecture_name
from lora_sr.checkpoints.stock import STOCK_NETWORKS

Recognizer = Callable[[Mapping[str, Tensor]], bool]
Builder = Callable[[Mapping[str, Tensor]], nn.Module]

# Family -> how it recognizes its state dict, and the network that it builds for it; the first match counts.
_OWN: dict[str, tuple[Recognizer, Builder]] = {
    'DSCLoRA': (is_dsclora, build_dsclora),
    'SPAN': (is_span, build_span),
    'LKDN': (is_lkdn, build_lkdn),
    'SPANF': (is_spanf, build_spanf),
    'SPANV2': (is_spanv2, build_spanv2),
    'DISP': (is_disp, build_disp),
    'DSCFFused': (is_dscf_fused, build_dscf_fused),
}
OURS = tuple(_OWN)
FAMILIES = {**_OWN, **{network.name: (network.recognize, network.build) for network in STOCK_NETWORKS}}
# Discriminators of BasicSR -> keys by which they are told.
DISCRIMINATORS = {
    'UNetDiscriminatorSN': {'conv0.weight', 'conv1.weight_orig', 'conv8.weight_orig', 'conv9.weight'},
    'VGGStyleDiscriminator': {'conv0_0.weight', 'bn0_1.weight', 'linear1.weight', 'linear2.weight'},
    'StyleGAN2Discriminator': {'conv_body.0.0.weight', 'final_conv.0.weight', 'final_linear.1.weight'},
}
GROWTH = 32  # channels that each convolution of a dense block of RRDBNet adds, as spandrel builds them


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """The name of the network that a state dict belongs to, or ``None`` where no family knows it."""
    return next((name for name, (recognize, _) in FAMILIES.items() if recognize(state)), None)


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
