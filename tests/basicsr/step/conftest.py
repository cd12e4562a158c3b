"""The options of small models, with a discriminator that takes a batch in parts."""

import functools

import pytest
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_steps import ConvDiscriminator, step_options


@pytest.fixture(autouse=True, scope='module')
def registered():
    ARCH_REGISTRY.register(ConvDiscriminator)
    yield
    del ARCH_REGISTRY._obj_map['ConvDiscriminator']


@pytest.fixture
def options(tmp_path):
    """A function: the options of a small model."""
    return functools.partial(step_options, tmp_path)
