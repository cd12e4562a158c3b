"""The compiled kernels against torch in float64, operation by operation."""

import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from lora_sr.errors import InputError
from lora_sr.runtime.native import library as library_module
from lora_sr.runtime.native.library import load_library
from lora_sr.runtime.native.program import Program, round_keeping_sums

SIZES = [(1, 1), (3, 7), (13, 16), (6, 33), (21, 300)]
ACTIVATIONS = {None: lambda x: x, 'silu': F.silu, 'gelu': F.gelu}
COMBINATIONS = {
    None: lambda x, other: x,
    'add': lambda x, other: x + other,
    'multiply': lambda x, other: x * other,
    'gate': lambda x, other: (x + other) * (torch.sigmoid(x) - 0.5),
}


@pytest.fixture(scope='module', params=['this machine', 'AVX2', 'SSE2'])
def library(request, tmp_path_factory):
    """The kernels as compiled for this machine, and for older ones, where it can run them."""
    machine = {'AVX2': '-march=haswell', 'SSE2': '-march=x86-64'}.get(request.param)
    if machine and platform.machine() not in ('x86_64', 'AMD64'):
        pytest.skip('this machine is not of the x86 family')
    if request.param == 'AVX2' and 'AVX2' not in torch.__config__.show() and 'AVX512' not in torch.__config__.show():
        pytest.skip('this machine has no AVX2')
    with pytest.MonkeyPatch.context() as patch:
        if machine:
            patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
            flags = tuple(machine if flag == '-march=native' else flag for flag in library_module.FLAGS)
            patch.setattr(library_module, 'FLAGS', flags)
        library = library_module._load_library.__wrapped__()
    if library is None:
        pytest.skip('there is no C++ compiler')
    return library


@pytest.fixture
def bfloat16_library():
    library = load_library()
    if library is None or not library.has_bfloat16():
        pytest.skip('there is no C++ compiler, or this machine has no AVX512-BF16')
    return library


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def identity_to_image(program, features, channels):
    """End a program with a 1x1 convolution that gives the features themselves, in float32."""
    program.conv_to_image([features], torch.eye(channels)[:, :, None, None], torch.zeros(channels), 1)


def load(program, channels):
    return program.load_image(torch.ones(channels), torch.zeros(channels))


def close(output, expected, tolerance=2e-5):
    assert output.shape == expected.shape and output.dtype == torch.float32
    assert ((output - expected).abs().max() / expected.abs().max()).item() <= tolerance


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('outputs', [1, 5, 26, 30, 61])
def test_conv3x3(library, size, outputs):
    x, weight, bias = tensors((2, 7, *size), (outputs, 7, 3, 3), (outputs,))
    program = Program(library)
    identity_to_image(program, program.conv([load(program, 7)], weight, bias), outputs)
    close(program(x), F.conv2d(x.double(), weight.double(), bias.double(), padding=1))


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('combination', COMBINATIONS)
def test_what_follows_a_convolution(library, activation, combination):
    x, weight, bias = tensors((1, 9, 11, 37), (9, 9, 1, 1), (9,))
    x, weight = 3 * x, 3 * weight  # into the tails of the activations
    program = Program(library)
    image = load(program, 9)
    identity_to_image(program, program.conv([image], weight, bias, activation, combination, image), 9)
    result = ACTIVATIONS[activation](F.conv2d(x.double(), weight.double(), bias.double()))
    close(program(x), COMBINATIONS[combination](result, x.double()), 1e-6)


def test_convolution_over_several_maps(library):
    x, first, second, weight = tensors((1, 4, 9, 20), (6, 4, 3, 3), (6, 4, 1, 1), (5, 12, 1, 1))
    program = Program(library)
    image = load(program, 4)
    maps = [program.conv([image], first, None, 'silu'), program.conv([image], second, None)]
    identity_to_image(program, program.conv(maps, weight, None), 5)
    x, first, second, weight = (tensor.double() for tensor in (x, first, second, weight))
    expected = F.conv2d(torch.cat([F.silu(F.conv2d(x, first, padding=1)), F.conv2d(x, second)], 1), weight)
    close(program(x), expected)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('kernel, dilation', [(3, 1), (5, 1), (5, 3)])
def test_depthwise(library, size, kernel, dilation):
    x, weight, bias = tensors((1, 7, *size), (7, 1, kernel, kernel), (7,))
    program = Program(library)
    identity_to_image(program, program.depthwise(load(program, 7), weight, bias, dilation, 'gelu'), 7)
    padding = kernel // 2 * dilation
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding, dilation=dilation, groups=7)
    close(program(x), F.gelu(expected))


def test_channel_norm(library):
    x, weight, bias = tensors((1, 24, 5, 19), (24,), (24,))
    x += 5
    program = Program(library)
    image = load(program, 24)
    identity_to_image(program, program.channel_norm(image, weight, bias, 1e-6, image), 24)
    x = x.double()
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (24,), weight.double(), bias.double(), 1e-6)
    close(program(x.float()), expected.permute(0, 3, 1, 2) + x)


@pytest.mark.parametrize('scale', [2, 3, 4])
def test_pixel_shuffle(library, scale):
    x, weight, bias = tensors((2, 5, 7, 21), (3 * scale**2, 5, 3, 3), (3 * scale**2,))
    program = Program(library)
    program.conv_to_image([load(program, 5)], weight, bias, scale)
    close(program(x), F.pixel_shuffle(F.conv2d(x.double(), weight.double(), bias.double(), padding=1), scale))


def test_image_is_scaled_and_shifted_before_the_border_of_zeros(library):
    x, weight = tensors((1, 3, 6, 6), (4, 3, 3, 3))
    factor, summand = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.5, 7.0])
    program = Program(library)
    identity_to_image(program, program.conv([program.load_image(factor, summand)], weight, None), 4)
    shifted = x.double() * factor[:, None, None] + summand[:, None, None]
    close(program(x), F.conv2d(shifted, weight.double(), padding=1))


@pytest.mark.parametrize('group_at', [None, 1, 3, 5])
@pytest.mark.parametrize('threads', [1, 2, 5])
def test_pipeline_of_many_operations(library, group_at, threads):
    """A chain with near and far references to earlier maps, whatever the groups, the threads and the height."""
    weights = tensors(*[(6, 6, 3, 3)] * 6)
    weights = [weight / 6 for weight in weights]
    (large,) = tensors((6, 1, 5, 5))
    program = Program(library)
    first = features = load(program, 6)
    for i, weight in enumerate(weights):
        if i == group_at:
            program.begin_group()
        features = program.conv([features], weight, None, 'silu', 'add', first)
        features = program.depthwise(features, large, torch.zeros(6), 3, None, 'add', features)
    identity_to_image(program, features, 6)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for height, width in ((97, 18), (5, 40), (64, 17), (97, 18)):
            (x,) = tensors((1, 6, height, width), seed=height)
            output = program(x)
            expected = x.double()
            for weight in weights:
                expected = F.silu(F.conv2d(expected, weight.double(), padding=1)) + x.double()
                expected = expected + F.conv2d(expected, large.double(), padding=6, dilation=3, groups=6)
            close(output, expected)
    finally:
        torch.set_num_threads(before)


def test_memory_does_not_grow_with_the_height(library):
    weights = tensors(*[(8, 8, 3, 3)] * 4)
    program = Program(library)
    features = load(program, 8)
    for weight in weights:
        features = program.conv([features], weight, None)
    identity_to_image(program, features, 8)
    program(torch.zeros(1, 8, 500, 20))
    words = program._memory.numel()
    program(torch.zeros(1, 8, 1000, 20))
    assert program._memory.numel() == words


def test_bfloat16(bfloat16_library):
    """The kernels err, in amplitude, by less than twice as much as torch in bfloat16; odd channels as well."""
    x, first, second, depth, last = tensors((1, 3, 21, 50), (7, 3, 3, 3), (9, 7, 3, 3), (9, 1, 5, 5), (12, 9, 3, 3))
    zeros = torch.zeros(9)
    program = Program(bfloat16_library, torch.bfloat16)
    features = program.conv([load(program, 3)], first, None, 'silu')
    features = program.conv([features], second, zeros)
    features = program.depthwise(features, depth, zeros, 1, 'gelu', 'multiply', features)
    features = program.channel_norm(features, zeros + 2, zeros + 1, 1e-5, features)
    program.conv_to_image([features], last, torch.zeros(12), 2)

    def reference(dtype):
        a, w1, w2, w3, w4 = (tensor.to(dtype) for tensor in (x, first, second, depth, last))
        a = F.conv2d(F.silu(F.conv2d(a, w1, padding=1)), w2, padding=1)
        a = F.gelu(F.conv2d(a, w3, padding=2, groups=9)) * a
        norm = F.layer_norm(a.permute(0, 2, 3, 1), (9,), (zeros + 2).to(dtype), (zeros + 1).to(dtype), 1e-5)
        return F.pixel_shuffle(F.conv2d(norm.permute(0, 3, 1, 2) + a, w4, padding=1), 2)

    exact = reference(torch.float64)
    ours, torchs = (program(x) - exact).pow(2).mean(), (reference(torch.bfloat16) - exact).pow(2).mean()
    assert 0 < ours < 4 * torchs  # Winograd's transforms are rounded as well


def test_from_float32_to_bfloat16_with_odd_channels(bfloat16_library):
    x, weight, bias = tensors((1, 3, 9, 70), (3, 1, 3, 3), (3,))
    program = Program(bfloat16_library, torch.bfloat16)
    identity_to_image(program, program.depthwise(load(program, 3), weight, bias), 3)
    close(program(x), F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=3), 1e-2)


def test_defaults_of_torch_do_not_matter(library):
    (x,) = tensors((1, 3, 8, 8))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device('meta'):
            program = Program(library)
            identity = torch.eye(3, device='cpu')[:, :, None, None]
            image = program.load_image(torch.ones(3, device='cpu'), torch.zeros(3, device='cpu'))
            program.conv_to_image([image], identity, torch.zeros(3, device='cpu'), 1)
            close(program(x), x.double())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_plan_that_fails_leaves_no_mixture(library, monkeypatch):
    weight, small, large = tensors((4, 4, 3, 3), (1, 4, 9, 9), (1, 4, 60, 200))
    program = Program(library)
    identity_to_image(program, program.conv([load(program, 4)], weight, None), 4)
    expected = program(small)

    def fails(height, rows_of_step):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(program, '_pipeline', fails)
        program(large)
    assert torch.equal(program(small), expected)


def test_threads_of_python_wait_for_each_other(library):
    weight, small, large = tensors((4, 4, 3, 3), (1, 4, 9, 9), (1, 4, 40, 50))
    program = Program(library)
    identity_to_image(program, program.conv([load(program, 4)], weight, None), 4)
    images = [small, large] * 10
    expected = [program(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(*pair) for pair in zip(pool.map(program, images), expected))


def test_rounding_keeps_sums():
    (weight,) = tensors((50, 20, 1, 3))
    weight = weight.double()
    rounded = round_keeping_sums(weight)
    assert torch.equal(rounded, rounded.to(torch.bfloat16).double())
    plain = weight.to(torch.bfloat16).double()
    largest = weight.abs().max(-1).values / 2**7  # the distance of neighbors in bfloat16, at most
    assert ((rounded - weight).abs().max(-1).values <= largest).all()
    error, plain_error = ((values.sum(-1) - weight.sum(-1)).pow(2).mean() for values in (rounded, plain))
    assert error < plain_error / 4


@pytest.mark.parametrize(
    'image', [torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, device='meta')]
)
def test_refuses_other_images(library, image):
    program = Program(library)
    identity_to_image(program, load(program, 3), 3)
    with pytest.raises(InputError, match=r'takes images \(N, 3, H, W\) of floating point on the CPU'):
        program(image)
