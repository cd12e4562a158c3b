"""Large depthwise convolutions on a CPU: what they give, and their gradients, beside torch's own in float64."""

import copy

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_steps import assert_near, built, steps
from torch import nn
from torch.nn import functional as F

from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.archs.lkdn import LKDN
from lora_sr.basicsr.step import depthwise
from lora_sr.basicsr.step.depthwise import depthwise_conv2d, is_large_depthwise
from lora_sr.basicsr.step.networks import StepNetworks
from lora_sr.basicsr.step.settings import StepSettings


@pytest.mark.parametrize(
    ('side', 'dilation', 'size'), [(5, 1, (9, 8)), (5, 3, (12, 12)), (5, 3, (7, 11)), (7, 2, (6, 5)), (11, 1, (4, 9))]
)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('has_avx512', [True, False])
def test_equals_torch(side, dilation, size, memory_format, has_avx512, monkeypatch):
    monkeypatch.setattr(depthwise, 'HAS_AVX512', has_avx512)
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 6, side, padding=side // 2 * dilation, dilation=dilation, groups=6)
    assert is_large_depthwise(convolution)
    x = torch.randn(2, 6, *size).contiguous(memory_format=memory_format)
    grad = torch.randn(2, 6, *size)
    exact = copy.deepcopy(convolution).double()
    wanted = x.double().requires_grad_()
    expected = exact(wanted)
    expected.backward(grad.double())
    image = x.requires_grad_()
    output = depthwise_conv2d(image, convolution.weight, convolution.bias, dilation)
    output.backward(grad)
    assert output.is_contiguous(memory_format=memory_format)
    for value, other in (
        (output, expected),
        (image.grad, wanted.grad),
        (convolution.weight.grad, exact.weight.grad),
        (convolution.bias.grad, exact.bias.grad),
    ):
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('has_avx512', [True, False])
def test_gradients_in_bfloat16_are_those_of_autocast(has_avx512, monkeypatch):
    monkeypatch.setattr(depthwise, 'HAS_AVX512', has_avx512)
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(8, 8, 5, padding=6, dilation=3, groups=8), torch.randn(2, 8, 24, 24)
    grads = []
    for run in (convolution, lambda image: depthwise_conv2d(image, convolution.weight, convolution.bias, 3)):
        convolution.zero_grad()
        image = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            output = run(image)
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        grads.append([image.grad, convolution.weight.grad.clone(), convolution.bias.grad.clone()])
    for expected, value in zip(*grads):
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ('has_avx512', 'dilation', 'dilations'), [(True, 3, {3}), (False, 3, {1}), (False, 2, {2}), (False, 1, {1})]
)
def test_no_convolution_is_dilated_where_that_is_slow(has_avx512, dilation, dilations, monkeypatch):
    seen, original = set(), F.conv2d

    def conv2d(*args):
        seen.add(args[5])
        return original(*args)

    monkeypatch.setattr(depthwise, 'HAS_AVX512', has_avx512)
    monkeypatch.setattr(depthwise.F, 'conv2d', conv2d)
    network = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2 * dilation, dilation=dilation, groups=4))
    networks = StepNetworks(StepSettings(None), torch.channels_last)
    networks.add('network_g', network)
    with networks.active():
        output = network(torch.rand(1, 4, 12, 12))
        assert seen == dilations
        seen.clear()
        output.sum().backward()
        assert seen <= dilations
        with torch.no_grad():
            network(torch.rand(1, 4, 12, 12))
        assert seen == dilations


@pytest.mark.parametrize(
    'options',
    [
        {'kernel_size': 3, 'padding': 1},
        {'kernel_size': 5, 'padding': 1},
        {'kernel_size': 5, 'padding': 2, 'stride': 2},
        {'kernel_size': (5, 7), 'padding': (2, 3)},
        {'kernel_size': 5, 'padding': 2, 'groups': 2},
        {'kernel_size': 5, 'padding': 2, 'padding_mode': 'reflect'},
        {'kernel_size': 5, 'padding': 'same'},
    ],
)
def test_others_are_left_alone(options):
    assert not is_large_depthwise(nn.Conv2d(4, 4, **{'groups': 4, **options}))


class LargeKernels(LKDN):
    """LKDN with LoRA on its attention beside weights that train."""

    def __init__(self):
        super().__init__(num_feat=8, num_atten=8, num_block=2, upscale=2)
        add_lora(self, LoRAConfig(['B1.atten.depthwise'], rank=1))
        self.requires_grad_(True)


def test_steps_are_those_without(options, monkeypatch):
    ARCH_REGISTRY.register(LargeKernels)
    try:
        opts = [options('SRModel'), options('SRModel', memory_format='channels_last')]
        for opt in opts:
            opt['network_g'] = {'type': 'LargeKernels'}
        plain, model = map(built, opts)
        seen = []
        original = torch.Tensor.flip
        monkeypatch.setattr(torch.Tensor, 'flip', lambda *args: seen.append(args[0].shape) or original(*args))
        assert_near(steps(model, 1, 6), steps(plain, 1, 6), 1e-4)
        assert seen.count((8, 1, 5, 5)) == 6 * 4
    finally:
        del ARCH_REGISTRY._obj_map['LargeKernels']


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(8, 8, 5, padding=6, dilation=3, groups=2),
        lambda: nn.Conv2d(8, 8, 3, padding=3, dilation=3, groups=8),
        lambda: nn.ConvTranspose2d(8, 8, 3, padding=2, dilation=2, groups=8),
    ],
)
def test_dilated_kernels_have_exact_gradients_under_autocast(make):
    """In bfloat16 and channels_last some of them are what was in the memory, on CPUs with AVX512-BF16."""
    torch.manual_seed(0)
    network, images = nn.Sequential(make()), torch.randn(2, 8, 32, 32)
    exact = copy.deepcopy(network).double()
    exact(images.double()).square().mean().backward()
    network.to(memory_format=torch.channels_last)
    networks = StepNetworks(StepSettings(torch.bfloat16), torch.channels_last)
    networks.add('network_g', network)
    with networks.active():
        network(images).square().mean().backward()
    for value, other in zip(network.parameters(), exact.parameters()):
        torch.testing.assert_close(value.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
