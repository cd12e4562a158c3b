"""What several of these tests begin with."""

import pytest
import torch
from adapter_files import ARCHS, adapt, run
from enlarging import Enlarge

from lora_sr.adapters import add_lora
from lora_sr.archs.span import SPAN
from lora_sr.deploy import upscale


@pytest.fixture
def enlarging(monkeypatch):
    """Any checkpoint is that network."""
    monkeypatch.setattr(upscale, 'load_network', lambda path: Enlarge())


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('checkpoint') / 'SPAN.pth'
    torch.save({'params': SPAN(feature_channels=6, upscale=2, deploy=True).state_dict()}, path)
    return path


@pytest.fixture(params=ARCHS)
def files(request, tmp_path):
    """A folder with base.pth, two adapted checkpoints (as BasicSR writes them) and their adapters; and the network."""
    build, *configs = ARCHS[request.param]
    torch.manual_seed(0)
    base = build().eval()
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    start = base.state_dict()
    for name, config in zip('ab', configs):
        network = build().eval()
        network.load_state_dict(start)
        at_start = add_lora(network, config).state_dict()
        network = build().eval()
        network.load_state_dict(start)
        adapted = adapt(network, config, ord(name)).state_dict()
        torch.save({'params': at_start, 'params_ema': adapted}, tmp_path / f'net_{name}.pth')
        assert run('extract', tmp_path / f'net_{name}.pth', '-o', tmp_path / f'{name}.safetensors') == 0
    return tmp_path, base
