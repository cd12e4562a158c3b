"""What the tests of adapters share."""

import pytest
import torch
from others import Tiny


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Tiny().eval()
