"""What a layer of a super-resolution network is for, told from structure and names."""

from __future__ import annotations

import re

from torch import nn

from lora_sr.adapters.layers import is_adaptable

GROUPS = ('conv', 'attention', 'mlp', 'upsampler')

# Of the parts between the dots of a layer's name.
ATTENTION = re.compile(r'.*(attn|atten|attention|qkv)\d*|(ca|cca|esa|lka|pa|sa|se)\d*|guidance_map_conv')  # of SPANV2
MLP = re.compile(r'.*(mlp|ffn|feed_?forward)\d*|fc\d*')
UPSAMPLER = re.compile(r'.*(upsampl|upconv|upscal|conv_up|pixel_?shuffle).*|up\d*', re.IGNORECASE)
# Of the layers that make queries and keys: a module that holds both is attention, whatever it is called.
QUERY_OR_KEY = re.compile(r'(?:to_)?(qkv|q|k|kv|query|key)(?:_?(?:proj|linear|conv))?')
# Of the classes around a layer.
ATTENTION_CLASS = re.compile(r'.*Attention')
MLP_CLASS = re.compile(r'.*(Mlp|MLP|FeedForward|FFN)(Block)?')


def layer_groups(model: nn.Module) -> dict[str, str]:
    """Every layer of ``model`` that carries LoRA or can, with the one group that it belongs to.

    - ``upsampler``: the layers that make the output from the last features of LR size: from the first layer that is
      called so, or that stands directly before a ``PixelShuffle``, to the end of the network, as it is registered;
    - ``attention``: ``nn.MultiheadAttention``, layers beside those that make queries and keys, and layers inside a
      module that is called so, or whose class is (``WindowAttention``); not the two linear layers of an MLP in it,
      which widen and narrow again;
    - ``mlp``: layers inside a module that is called so, or whose class is (``MLPBlock``), and all linear layers and
      embeddings outside of attention;
    - ``conv``: all other convolutions.

    The networks of BasicSR and of this package are resolved as their papers describe them, and so are the vision
    transformers of torchvision and timm; for a network of one's own, ``lora-sr inspect`` shows what becomes of it.

    Returns:
        Name -> group, in the order of ``named_modules``.
    """
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if is_adaptable(module)]
    upsampler = _first_of_upsampler(modules, names)
    return {
        name: 'upsampler' if upsampler is not None and index >= upsampler else _group_of(modules, name)
        for index, name in enumerate(names)
    }


def _group_of(modules: dict[str, nn.Module], name: str) -> str:
    """The group of a layer that is not of the upsampler."""
    parts = name.split('.')
    classes = [type(modules['.'.join(parts[:depth])]).__name__ for depth in range(1, len(parts))]
    parent = modules[name.rpartition('.')[0]]
    is_linear = isinstance(modules[name], nn.Linear)
    is_attention = (
        isinstance(modules[name], nn.MultiheadAttention)
        or any(map(ATTENTION.fullmatch, parts))
        or any(map(ATTENTION_CLASS.fullmatch, classes))
        or (_makes_queries(parent) and not MLP.fullmatch(parts[-1]))
    )
    if is_attention and not (is_linear and _widens_and_narrows(modules[name], parent)):
        return 'attention'
    is_mlp = is_linear or isinstance(modules[name], nn.Embedding) or any(map(MLP.fullmatch, parts))
    return 'mlp' if is_mlp or any(map(MLP_CLASS.fullmatch, classes)) else 'conv'


def _makes_queries(module: nn.Module) -> bool:
    made = {match[1] for match in map(QUERY_OR_KEY.fullmatch, module._modules) if match}
    return 'qkv' in made or bool(made & {'q', 'query'} and made & {'k', 'kv', 'key'})


def _widens_and_narrows(layer: nn.Module, parent: nn.Module) -> bool:
    """Whether a linear layer is one of the two of an MLP: in -> hidden > in, and hidden -> in right after it."""
    linear = [child for child in parent._modules.values() if isinstance(child, nn.Linear)]
    pairs = [
        pair
        for pair in zip(linear, linear[1:])
        if pair[0].in_features == pair[1].out_features < pair[0].out_features == pair[1].in_features
    ]
    return not _makes_queries(parent) and any(layer in pair for pair in pairs)


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
