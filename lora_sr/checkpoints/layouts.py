"""Names of weights in files that differ from those in their network, and the way back."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Value = TypeVar('Value')

ATTRIBUTE = '_file_layout'
# RRDBNet as ESRGAN's authors first named it (`model.1.sub`), and as they, BSRGAN and RealSR did later (`RRDB_trunk`).
RRDBNET_NAMES = (
    (
        (r'model\.0\.(\w+)', r'conv_first.\1'),
        (r'model\.1\.sub\.(\d+)\.RDB([123])\.conv([1-5])\.0\.(\w+)', r'body.\1.rdb\2.conv\3.\4'),
        (r'model\.1\.sub\.\d+\.(\w+)', r'conv_body.\1'),
        (r'model\.3\.(\w+)', r'conv_up1.\1'),
        (r'model\.6\.(\w+)', r'conv_up2.\1'),
        (r'model\.8\.(\w+)', r'conv_hr.\1'),
        (r'model\.10\.(\w+)', r'conv_last.\1'),
    ),
    (
        (r'(conv_first|conv_last)\.(\w+)', r'\1.\2'),
        (r'RRDB_trunk\.(\d+)\.RDB([123])\.conv([1-5])\.(\w+)', r'body.\1.rdb\2.conv\3.\4'),
        (r'trunk_conv\.(\w+)', r'conv_body.\1'),
        (r'upconv([12])\.(\w+)', r'conv_up\1.\2'),
        (r'HRconv\.(\w+)', r'conv_hr.\1'),
    ),
)
RRDBNET_LAYERS = {'conv_first', 'conv_body', 'conv_up1', 'conv_up2', 'conv_hr', 'conv_last'}


def layout_of(network: nn.Module) -> dict[str, str]:
    """Name in the state dict of a network -> name in the file of its weights, of those that differ."""
    return dict(vars(network).get(ATTRIBUTE, {}))


def set_layout(network: nn.Module, layout: Mapping[str, str]) -> None:
    """Note on a network how the file of its weights names them."""
    setattr(network, ATTRIBUTE, dict(layout))


def in_layout(state: Mapping[str, Value], layout: Mapping[str, str]) -> OrderedDict[str, Value]:
    """A state dict under the names of a file."""
    return OrderedDict((layout.get(name, name), value) for name, value in state.items())


def as_rrdbnet(state: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, str]] | None:
    """A state dict of RRDBNet in one of its older layouts under the names of BasicSR, and its layout.

    Returns:
        ``None`` where it is not in such a layout, or has layers that BasicSR's network does not have.
    """
    for patterns in RRDBNET_NAMES:
        layout: dict[str, str] = {}
        for name in state:
            found = ((re.fullmatch(old, name), new) for old, new in patterns)
            new_name = next((match.expand(new) for match, new in found if match), None)
            if new_name is None or new_name in layout:
                break
            layout[new_name] = name
        else:
            layers = {name.partition('.')[0] for name in layout} - {'body'}
            if layers == RRDBNET_LAYERS:
                renamed = OrderedDict((new_name, state[name]) for new_name, name in layout.items())
                return renamed, {new_name: name for new_name, name in layout.items() if new_name != name}
    return None
