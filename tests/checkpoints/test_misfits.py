"""Weights that do not fit are told by the tensors that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from wrapped import plain

from lora_sr.checkpoints import load_network
from lora_sr.checkpoints.content import load_weights
from lora_sr.errors import InputError


def test_weights_beside_others_of_its_shape_are_named(tmp_path):
    """What differs is told, and not what follows from it."""
    state = {**plain(), 'conv_last.weight': torch.zeros(3), 'conv_last.bias': torch.zeros(3)}
    del state['conv_cat.weight']
    torch.save(state, tmp_path / 'net.pth')
    with pytest.raises(InputError) as raised:
        load_network(tmp_path / 'net.pth')
    assert 'conv_1.eval_conv.weight' in str(raised.value)  # its first keys

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    changed = {**network.state_dict(), '1.weight': torch.zeros(5, 4, 3, 3)}
    with pytest.raises(InputError, match=r'1.weight has shape \(5, 4, 3, 3\) instead of \(4, 4, 3, 3\)\.?$'):
        load_weights(network, changed, Path('net.pth'))


def test_the_odd_layer_of_a_span_is_the_one_that_is_blamed(tmp_path):
    """Whichever of its layers is of another width."""
    for odd in ('conv_cat.weight', 'conv_1.eval_conv.weight', 'block_4.c2_r.eval_conv.weight'):
        state = plain()
        state[odd] = torch.zeros(7, *state[odd].shape[1:])
        torch.save(state, tmp_path / 'net.pth')
        with pytest.raises(
            InputError, match=rf'does not fit SPAN: {odd} has shape \(7, [^)]*\) instead of \(4, [^)]*\)\.?$'
        ):
            load_network(tmp_path / 'net.pth')
