"""Deployed networks on a GPU: precision, recorded passes, compilation, and images in tiles."""

import copy
import functools
import threading
import time

import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.swinir_arch import SwinIR
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_sr
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN
from lora_sr.runtime import deployed
from lora_sr.runtime.deployed import CANNOT_BE_RECORDED, MOST_GRAPHS, _GraphPerSize
from lora_sr.runtime.synthetic import synthetic_image
from lora_sr.runtime.upscaler import Upscaler

# dB beside float64 that each form keeps at least. An H100 gave some 80, 54 and 71 (docs/performance.md).
LEAST_PSNR = {torch.float32: 74, torch.bfloat16: 51, torch.float16: 66}


def enlarge(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return SPAN(feature_channels=6, upscale=2, deploy=True).eval()


def recorded(network, device) -> _GraphPerSize:
    """Passes that come again are recorded, on the CPU as on a GPU."""
    return _GraphPerSize(network.to(device, memory_format=torch.channels_last), torch.float32)


def assert_same(output, expected):
    assert (output - expected).abs().max() <= 1e-2 * expected.abs().max()  # TF32 rounds to 10 bits


@pytest.fixture(scope='module', params=['SPAN/spantiny_ch26_x4', 'LKDN/LKDN_x4'])
def official(request, shared) -> tuple:
    """A network, an image, and what the network makes of it in float64."""
    network, image = lora_sr.load_network(shared / 'weights' / f'{request.param}.pth'), synthetic_image(1, 3, 32, 24)
    with torch.no_grad():
        return network, image, copy.deepcopy(network).double()(image.double())


@pytest.mark.parametrize('dtype', LEAST_PSNR)
def test_precision(official, device, uncompiled, dtype):
    if device.type == 'cpu' and dtype == torch.float16:
        pytest.skip('float16 is for GPUs')
    network, image, expected = official
    optimized = lora_sr.optimize(copy.deepcopy(network).to(device), dtype)
    for _ in range(3):  # as it comes, recorded, and replayed
        output = optimized(image.to(device))
        assert output.dtype == torch.float32
        error = (output.cpu().double().clamp(0, 1) - expected.clamp(0, 1)).square().mean()
        assert -10 * error.log10() >= LEAST_PSNR[dtype]


@torch.inference_mode()
def test_a_size_that_comes_again_is_replayed(device, uncompiled):
    network = enlarge()
    graphs = recorded(copy.deepcopy(network), device)
    network = network.to(device)
    for number in range(4):
        for size in ((1, 3, 24, 20), (2, 3, 24, 20), (1, 3, 20, 24)):
            image = synthetic_image(*size).to(device) * (1 + number) / 4
            assert_same(graphs(image), network(image))
    assert len(graphs.graphs) == 3 and all(isinstance(kept, tuple) for kept in graphs.graphs.values())


@torch.inference_mode()
def test_results_have_their_own_memory(device, uncompiled):
    graphs = recorded(enlarge(), device)
    images = [synthetic_image(1, 3, 16, 16).to(device) * factor for factor in (1, 0.9, 0.8, 0.7)]
    outputs = [graphs(image) for image in images]
    copies = [output.clone() for output in outputs]
    graphs(images[0] * 0.1)
    assert all(torch.equal(*pair) for pair in zip(outputs, copies))
    assert not torch.equal(outputs[2], outputs[3])


@torch.inference_mode()
def test_the_last_sizes_are_kept(device, uncompiled):
    network = enlarge()
    graphs = recorded(copy.deepcopy(network), device)
    sizes = [torch.Size([1, 3, 16, 16 + more]) for more in range(MOST_GRAPHS + 1)]
    for size in sizes:
        for _ in range(2):
            output = graphs(synthetic_image(*size).to(device))
    assert list(graphs.graphs) == sizes[1:]
    graphs(synthetic_image(*sizes[1]).to(device))  # is the last that is given up from now on
    output = graphs(synthetic_image(*sizes[0]).to(device))
    assert list(graphs.graphs) == [*sizes[3:], sizes[1], sizes[0]]
    assert_same(output, network.to(device)(synthetic_image(*sizes[0]).to(device)))


@torch.inference_mode()
def test_weights_that_are_loaded_are_seen(device, uncompiled):
    network, other = enlarge(), enlarge(1)
    image = synthetic_image(1, 3, 16, 16).to(device)
    graphs = recorded(network, device)
    before = [graphs(image) for _ in range(3)][-1]
    network.load_state_dict(other.state_dict())
    expected = other.to(device)(image)
    assert_same(graphs(image), expected)
    assert (before - expected).abs().max() > 0.1 * expected.abs().max()


def test_threads_take_turns(device, uncompiled):
    class Slow(nn.Upsample):
        def forward(self, x):
            time.sleep(0.001)  # another thread may come in between
            return super().forward(x)

    graphs, wrong = recorded(Slow(scale_factor=2), device), []

    @torch.inference_mode()
    def work(value):
        image = torch.full((1, 3, 8, 8), float(value), device=device)
        wrong.extend(value for _ in range(20) if not (graphs(image) == value).all())

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and isinstance(graphs.graphs[torch.Size([1, 3, 8, 8])], tuple)


@torch.inference_mode()
def test_what_cannot_be_recorded_runs(device, uncompiled, monkeypatch):
    """SwinIR makes a mask on the CPU at each pass, which a graph cannot have."""
    if device.type == 'cpu':

        def refuse(run, stream):
            raise RuntimeError('operation not permitted when stream is capturing')

        monkeypatch.setattr(deployed, 'capture', refuse)
    torch.manual_seed(0)
    network = SwinIR(img_size=8, embed_dim=12, depths=[2], num_heads=[2], window_size=4, mlp_ratio=2, upscale=2,
                     upsampler='pixelshuffledirect').eval()  # fmt: skip
    graphs = recorded(copy.deepcopy(network), device)
    image = synthetic_image(1, 3, 16, 12).to(device)
    expected = network.to(device)(image)
    for _ in range(4):
        assert_same(graphs(image), expected)
    assert list(graphs.graphs.values()) == [CANNOT_BE_RECORDED]
    if device.type == 'cuda':  # which goes on
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        graphs, expected = recorded(enlarge(), device), enlarge().to(device)(image)
        for _ in range(3):
            assert_same(graphs(image), expected)
        assert CANNOT_BE_RECORDED not in graphs.graphs.values()


@pytest.mark.parametrize('make', [enlarge, lambda: LKDN(num_feat=8, num_atten=8, num_block=1, upscale=2).eval()])
@torch.inference_mode()
def test_a_square_image_is_not_compiled_for_squares_alone(device, monkeypatch, make):
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=counter))
    network = make().to(device, memory_format=torch.channels_last)
    compiled = deployed._compile(network)
    for height, width in ((100, 100), (90, 100), (100, 90), (110, 110)):
        compiled(synthetic_image(1, 3, height, width).to(device, memory_format=torch.channels_last))
    assert counter.frame_count == 1


@pytest.mark.gpu
@torch.inference_mode()
def test_compiled_and_recorded():
    network = enlarge().cuda()
    optimized = lora_sr.optimize(network)
    for size in ((32, 32), (24, 32)):
        image = synthetic_image(1, 3, *size).cuda()
        for _ in range(3):
            assert_same(optimized(image), network(image))
    assert optimized.engine == 'torch.compile' and optimized._graphs.network is not optimized._graphs.plain
    assert all(isinstance(kept, tuple) for kept in optimized._graphs.graphs.values())


def test_tiles_equal_the_whole(device, uncompiled, shared):
    network = lora_sr.load_network(shared / 'weights' / 'SPAN/spantiny_ch26_x4.pth')
    image = (synthetic_image(1, 3, 150, 130)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    whole, tiled = Upscaler(network), Upscaler(network, tile=96)
    assert whole.device.type == device.type or torch.cuda.is_available()
    pieces = []
    difference = np.abs(whole(image).astype(int) - tiled(image, lambda *tile: pieces.append(tile)))
    assert len(pieces) > 1 and difference.max() <= 1


def test_bfloat16_keeps_the_sums_of_kernels(device, uncompiled):
    torch.manual_seed(0)
    network = EDSR(3, 3, num_feat=16, num_block=2, upscale=2).to(device)
    optimized = lora_sr.optimize(network, torch.bfloat16)
    errors = {'ours': 0.0, 'rounding': 0.0}
    for exact, rounded in zip(network.parameters(), optimized.network.parameters()):
        if exact.ndim == 4:
            sums = exact.sum((2, 3))
            errors['ours'] += (rounded.float().sum((2, 3)) - sums).abs().sum().item()
            errors['rounding'] += (exact.bfloat16().float().sum((2, 3)) - sums).abs().sum().item()
    assert errors['ours'] < errors['rounding'] / 2
    again = copy.deepcopy(optimized)  # prepares itself once more
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), optimized.parameters()))
