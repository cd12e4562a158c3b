"""The devices: what only a GPU can show is tried on the CPU as well, as far as that goes, so that the tests are."""

import contextlib

import pytest
import torch

from lora_sr.runtime import deployed


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('there is no GPU')
    return torch.device(request.param)


class PretendedGraph:
    """A CUDA graph on the CPU: what ran while it was recorded runs again, from and into the same tensors."""

    recording = None

    def __init__(self):
        self.passes = []

    def replay(self):
        for network, source, result in self.passes:
            result.copy_(network(source))


class PretendedStream:
    def wait_stream(self, stream):
        pass


def record(run, stream):
    graph = PretendedGraph.recording = PretendedGraph()
    try:
        return graph, run()
    finally:
        PretendedGraph.recording = None


@pytest.fixture
def uncompiled(device, monkeypatch):
    """Networks are recorded as they are, which saves many seconds; on the CPU the recording is pretended."""

    def leave(network):
        def run(image):
            result = network(image)
            if PretendedGraph.recording is not None:
                PretendedGraph.recording.passes.append((network, image, result))
            return result

        return network if device.type == 'cuda' else run

    monkeypatch.setattr(deployed, '_compile', leave)
    if device.type == 'cpu':
        for name, pretended in {
            'device': lambda _: contextlib.nullcontext(),
            'stream': lambda _: contextlib.nullcontext(),
            'Stream': PretendedStream,
            'current_stream': PretendedStream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, pretended)
        monkeypatch.setattr(deployed, 'capture', record)
