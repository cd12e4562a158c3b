"""What a layer of a super-resolution network is for, told from names and structure."""

from __future__ import annotations

import re

from torch import nn

from lora_sr.adapters.layers import LORA_LAYERS, LoRALayer

GROUPS = ('conv', 'attention', 'mlp', 'upsampler')

# Of the parts between the dots of a layer's name.
ATTENTION = re.compile(r'.*(attn|atten|attention|qkv)\d*|(ca|cca|esa|lka|pa|sa|se)\d*')
MLP = re.compile(r'.*(mlp|ffn|feed_?forward)\d*|fc\d*')
UPSAMPLER = re.compile(r'.*(upsampl|upconv|upscal|conv_up|pixel_?shuffle).*|up\d*', re.IGNORECASE)


def layer_groups(model: nn.Module) -> dict[str, str]:
    """Every layer of ``model`` that carries LoRA or can, with the one group that it belongs to.

    - ``upsampler``: the layers that make the output from the last features of LR size: from the first layer that is
      called so, or that stands directly before a ``PixelShuffle``, to the end of the network, as it is registered;
    - ``attention``: layers inside a module that is called so, or whose class is (``WindowAttention``);
    - ``mlp``: likewise, and all linear layers outside of attention;
    - ``conv``: all other convolutions.

    The networks of BasicSR and of this package are resolved as their papers describe them; for a network of one's own,
    ``lora-sr inspect`` shows what becomes of it.

    Returns:
        Name -> group, in the order of ``named_modules``.
    """
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if is_adaptable(module)]
    upsampler = _first_of_upsampler(modules, names)
    groups = {}
    for name in names:
        if upsampler is not None and names.index(name) >= upsampler:
            groups[name] = 'upsampler'
        elif _is_inside(modules, name, ATTENTION, 'Attention'):
            groups[name] = 'attention'
        elif _is_inside(modules, name, MLP, 'Mlp') or isinstance(modules[name], nn.Linear):
            groups[name] = 'mlp'
        else:
            groups[name] = 'conv'
    return groups


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module carries LoRA or can. A weight that is computed (``weight_norm``) cannot be adapted."""
    return isinstance(module, LoRALayer) or (type(module) in LORA_LAYERS and 'weight' in module._parameters)


def _first_of_upsampler(modules: dict[str, nn.Module], names: list[str]) -> int | None:
    """The index in ``names`` of the upsampler's first layer."""
    for index, name in enumerate(names):
        if any(UPSAMPLER.fullmatch(part) for part in name.split('.')):
            return index
    latest = None
    for name, module in modules.items():
        if isinstance(module, nn.PixelShuffle):
            return latest
        if is_adaptable(module):
            latest = names.index(name)
    return None


def _is_inside(modules: dict[str, nn.Module], name: str, pattern: re.Pattern, class_ending: str) -> bool:
    parts = name.split('.')
    if any(pattern.fullmatch(part) for part in parts):
        return True
    outer = ('.'.join(parts[:depth]) for depth in range(1, len(parts)))
    return any(type(modules[path]).__name__.endswith(class_ending) for path in outer)
