"""Attention in plain operators, against torch's own."""

import copy

import pytest
import torch
from torch import nn

from lora_sr.deploy.exports.attention import PlainAttention, use_plain_attention


@torch.no_grad()
@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize(
    'arguments', [{}, {'bias': False}, {'kdim': 6, 'vdim': 10}, {'add_bias_kv': True}, {'add_zero_attn': True}]
)
@pytest.mark.parametrize('mask', [None, 'float', 'bool', 'of heads'])
def test_it_is_torchs(batch_first, arguments, mask):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **arguments).double().eval()
    for parameter in attention.parameters():
        parameter.normal_()
    plain = copy.deepcopy(attention)
    use_plain_attention(plain)
    assert type(plain) is PlainAttention
    q, k, v = (
        torch.rand(*((3, n) if batch_first else (n, 3)), width, dtype=torch.float64)
        for n, width in ((5, 8), (7, arguments.get('kdim', 8)), (7, arguments.get('vdim', 8)))
    )
    masks = {
        None: None,
        'float': torch.randn(5, 7, dtype=torch.float64),
        'bool': torch.rand(5, 7) < 0.3,
        'of heads': torch.randn(6, 5, 7, dtype=torch.float64),
    }
    for options in ({'need_weights': False}, {}, {'average_attn_weights': False}):
        expected, given = (one(q, k, v, attn_mask=masks[mask], **options) for one in (attention, plain))
        torch.testing.assert_close(given[0], expected[0])
        if expected[1] is None:
            assert given[1] is None
        else:
            torch.testing.assert_close(given[1], expected[1])
