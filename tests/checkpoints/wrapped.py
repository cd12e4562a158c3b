"""A small SPAN, its weights, and what wraps them."""

from __future__ import annotations

from collections import OrderedDict

import torch

from lora_sr.archs import SPAN


def plain() -> OrderedDict:
    torch.manual_seed(0)
    return SPAN(feature_channels=4, upscale=2, deploy=True).state_dict()


def other() -> OrderedDict:
    return OrderedDict((name, value + 1) for name, value in plain().items())


def before(prefix: str, state: dict) -> dict:
    return {f'{prefix}{name}': value for name, value in state.items()}


def assert_equal(state: dict) -> None:
    expected = plain()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
