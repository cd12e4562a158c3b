"""Groups of layers: the vision transformers of torchvision and timm, and networks whose names tell nothing."""

import pytest
from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora, layer_groups, left_alone


@pytest.mark.parametrize('is_adapted', [False, True])
def test_groups_of_the_vision_transformer_of_torchvision(is_adapted):
    models = pytest.importorskip('torchvision').models
    network = models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    if is_adapted:
        add_lora(network, LoRAConfig(groups=['all'], rank=1, also_train=['bias', 'norm', 'parameters']))
    expected = {'conv_proj': 'conv'}
    for index in range(2):
        layer = f'encoder.layers.encoder_layer_{index}'
        expected.update(dict.fromkeys([f'{layer}.self_attention', f'{layer}.self_attention.out_proj'], 'attention'))
        expected.update(dict.fromkeys([f'{layer}.mlp.0', f'{layer}.mlp.3'], 'mlp'))
    assert layer_groups(network) == {**expected, 'heads.head': 'mlp'}
    assert left_alone(network) == []


def test_groups_of_the_vision_transformer_of_timm():
    models = pytest.importorskip('timm').models
    network = models.VisionTransformer(32, 8, embed_dim=16, depth=1, num_heads=2, init_values=0.1)
    assert layer_groups(network) == {
        'patch_embed.proj': 'conv',
        **dict.fromkeys(['blocks.0.attn.qkv', 'blocks.0.attn.proj'], 'attention'),
        **dict.fromkeys(['blocks.0.mlp.fc1', 'blocks.0.mlp.fc2', 'head'], 'mlp'),
    }
    # The layer scales, the token of the class and the table of positions.
    add_lora(network, LoRAConfig(groups=['attention'], rank=1, also_train=['parameters']))
    deltas = {key for key in network.state_dict() if 'lora_shift' in key}
    assert deltas == {
        *('lora_shift_cls_token', 'lora_shift_pos_embed'),
        *('blocks.0.ls1.lora_shift_gamma', 'blocks.0.ls2.lora_shift_gamma'),
    }
    assert left_alone(network) == []


class Mixer(nn.Module):
    """Attention by what it makes, not by its name."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 6))
        self.last = nn.Linear(6, 6)


class BlockWithAttention(nn.Module):
    """A whole block that is called after its attention, with an MLP of two linear layers and a squeeze of two."""

    def __init__(self):
        super().__init__()
        self.mix = Mixer('to_q', 'to_kv')
        self.one, self.act, self.two = nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)
        self.squeeze = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 6))


class Widening(nn.Module):
    """Attention whose values are wider than its input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.wide, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 6)


@pytest.mark.parametrize(
    'network, mlp',
    [
        (nn.ModuleDict({'x': Mixer('qkv')}), []),
        (nn.ModuleDict({'x': Mixer('query', 'key', 'value')}), []),
        (nn.ModuleDict({'x': Mixer('q_proj', 'k_proj', 'v_proj')}), []),
        (Mixer('to_q', 'to_kv'), []),
        (nn.ModuleDict({'x': Mixer('q', 'r')}), ['x.q', 'x.r', 'x.last']),
        (nn.ModuleDict({'x': nn.MultiheadAttention(6, 2)}), []),
        (nn.ModuleDict({'x': BlockWithAttention()}), ['x.one', 'x.two']),
        (nn.ModuleDict({'x': Widening()}), []),
        (
            nn.ModuleDict({'q': nn.Linear(6, 6), 'k': nn.Linear(6, 6), 'fc1': nn.Linear(6, 9), 'x': Mixer('y')}),
            ['fc1', 'x.y', 'x.last'],
        ),
        (nn.Linear(6, 6), ['']),
        (nn.ModuleDict({'attn': nn.Linear(6, 6), 'words': nn.Embedding(5, 6)}), ['words']),
    ],
)
def test_attention_is_told_from_structure(network, mlp):
    groups = layer_groups(network)
    assert set(groups.values()) <= {'attention', 'mlp'}
    assert [name for name, group in groups.items() if group == 'mlp'] == mlp
