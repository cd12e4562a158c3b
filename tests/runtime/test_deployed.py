"""`lora_sr.optimize`: the images of the network itself, on every engine."""

import copy
import io
import logging
import pickle

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs.ecbsr_arch import ECBSR
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.swinir_arch import SwinIR
from basicsr.metrics import calculate_psnr
from basicsr.utils import img2tensor, tensor2img
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import lora_sr
from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.archs import network_info
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN
from lora_sr.benchmarks.lkdn import with_official_structure
from lora_sr.errors import InputError
from lora_sr.runtime import deployed as deployed_module
from lora_sr.runtime.native import library as library_module
from lora_sr.runtime.native import networks as networks_module
from lora_sr.runtime.synthetic import synthetic_image

OFFICIAL = ['DSCLoRA/DSCF_ch26_x4', 'SPAN/span_ch28_x4', 'SPAN/spantiny_ch26_x4', 'LKDN/LKDN_x4', 'LKDN/LKDN-S_x4']


@pytest.fixture
def needs_kernels():
    if library_module.load_library() is None:
        pytest.skip('there is no C++ compiler')


@pytest.fixture
def needs_bfloat16(needs_kernels):
    if not library_module.load_library().has_bfloat16():
        pytest.skip('this machine has no AVX512-BF16')


def randomized(network, seed=0):
    """A network with weights as after a training: not zero where layers begin with zeros, no symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


def small_networks():
    torch.manual_seed(0)
    span = randomized(SPAN(feature_channels=9, upscale=3))
    lora = randomized(DSCLoRA(feature_channels=8, upscale=2, rank=2))
    edsr = randomized(EDSR(3, 3, num_feat=8, num_block=2, upscale=2))
    adapted = add_lora(randomized(EDSR(3, 3, num_feat=8, num_block=2, upscale=2)), LoRAConfig(['body.*'], rank=2))
    return {
        'SPAN in training form': span,
        'DSCLoRA': lora,
        'SPAN of gray': randomized(SPAN(1, 1, feature_channels=9, upscale=2)),
        'SPAN without normalization': randomized(SPAN(3, 1, feature_channels=8, upscale=2, norm=False)),
        'LKDN': randomized(LKDN(num_feat=10, num_atten=6, num_block=2, upscale=2)),
        'LKDN, odd halves, branches': randomized(
            LKDN(num_feat=14, num_atten=7, num_block=3, upscale=3, conv='BSConvU_rep', upsampler='pixelshuffle_rep')
        ),
        'LKDN with an identity': randomized(LKDN(num_feat=8, num_atten=8, num_block=1, conv='BSConvU_idt')),
        'EDSR': edsr,
        'EDSR with LoRA': randomized(adapted),
    }


@pytest.mark.parametrize('name', small_networks())
def test_images_of_the_network(name):
    network = small_networks()[name]
    before = copy.deepcopy(network.state_dict())
    optimized = lora_sr.optimize(network)
    channels = network_info(network).in_channels
    for size in ((1, channels, 17, 30), (2, channels, 40, 23)):
        image = synthetic_image(*size)
        with torch.no_grad():
            expected = copy.deepcopy(network).double()(image.double())
        output = optimized(image)
        assert output.dtype == torch.float32 and not output.requires_grad
        # Random weights are harder than trained ones: torch in float32 is off by 1e-5 as well.
        assert ((output - expected).abs().max() / expected.abs().max()).item() < 5e-5
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    'name',
    ['SPAN in training form', 'DSCLoRA', 'SPAN of gray', 'SPAN without normalization']
    + ['LKDN', 'LKDN, odd halves, branches'],
)
def test_ours_run_on_the_kernels(needs_kernels, name):
    assert lora_sr.optimize(small_networks()[name]).engine == 'kernels'


def test_the_rest_runs_by_torch():
    for name in ('EDSR', 'LKDN with an identity'):
        assert lora_sr.optimize(small_networks()[name]).engine == 'torch'


def test_a_changed_network_is_not_taken_for_the_original():
    class Brighter(SPAN):
        def forward(self, x):
            return super().forward(x) + 1

    class Doubling(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    def changed(name):
        network = randomized(SPAN(feature_channels=4, upscale=2, deploy=True))
        if name == 'hook':
            network.block_2.register_forward_hook(lambda module, inputs, output: (output[0] * 2, output[1]))
        elif name == 'module':
            network.block_1.c1_r.eval_conv = Doubling(4, 4, 3, padding=1)
        elif name == 'forward':
            network.conv_cat.forward = lambda x: x[:, :4]
        return network

    image = synthetic_image(1, 3, 9, 9)
    networks = [randomized(Brighter(feature_channels=4, upscale=2, deploy=True))]
    networks += [changed(name) for name in ('hook', 'module', 'forward')]
    for network in [*networks, with_official_structure(small_networks()['LKDN'])]:
        optimized = lora_sr.optimize(network)
        assert optimized.engine == 'torch'
        with torch.no_grad():
            assert torch.allclose(optimized(image), network(image), atol=1e-5)


def test_without_a_compiler(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv('CXX', '/no/such/compiler')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(networks_module, 'load_library', library_module._load_library.__wrapped__)
    network = small_networks()['LKDN']
    with caplog.at_level(logging.WARNING):
        optimized = lora_sr.optimize(network)
    assert optimized.engine == 'torch' and '/no/such/compiler cannot compile' in caplog.text
    image = synthetic_image(1, 3, 20, 20)
    with torch.no_grad():
        assert torch.allclose(optimized(image), network(image), atol=1e-5)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Kernels that are compiled in a third of the time, for tests in which they do not run."""
    monkeypatch.setattr(library_module, 'FLAGS', ['-O0' if flag == '-O3' else flag for flag in library_module.FLAGS])


def test_kernels_are_compiled_once(needs_kernels, quick_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert library_module._load_library.__wrapped__() is not None
    (compiled,) = (tmp_path / 'lora_sr').iterdir()
    before = compiled.stat().st_mtime_ns
    assert library_module._load_library.__wrapped__() is not None
    assert [path.stat().st_mtime_ns for path in (tmp_path / 'lora_sr').iterdir()] == [before]


def test_a_damaged_cache_is_made_anew(needs_kernels, quick_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    library_module._load_library.__wrapped__()
    (compiled,) = (tmp_path / 'lora_sr').iterdir()
    compiled.unlink()  # the loaded file itself must not be written to
    compiled.write_bytes(b'')
    assert library_module._load_library.__wrapped__().most_outputs() > 0


def test_no_home_and_a_compiler_with_arguments(needs_kernels, quick_compiler, monkeypatch):
    def no_home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(library_module.Path, 'home', no_home)
    monkeypatch.setenv('CXX', 'c++ -g0')
    assert library_module._load_library.__wrapped__() is not None


@pytest.mark.parametrize('through', [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_run(through):
    optimized = lora_sr.optimize(small_networks()['LKDN'])
    image = synthetic_image(1, 3, 16, 16)
    expected = optimized(image)
    copied = through(optimized)
    del optimized
    assert torch.equal(copied(image), expected)


def onnx_of(module, image, dynamo):
    """What ONNX Runtime makes of a module that was exported with an image."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript' if dynamo else 'onnx')
    file = io.BytesIO()
    torch.onnx.export(module, (image,), file, dynamo=dynamo, input_names=['image'])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    return lambda other: torch.from_numpy(session.run(None, {'image': other.numpy()})[0])


RECORDERS = {
    'jit.trace': lambda module, image: torch.jit.trace(module, image),
    'onnx': lambda module, image: onnx_of(module, image, dynamo=False),
    'onnx by dynamo': lambda module, image: onnx_of(module, image, dynamo=True),
    'export': lambda module, image: torch.export.export(module, (image,)).module(),
    'compile': lambda module, image: torch.compile(module, backend='eager', fullgraph=True),
    'fx': lambda module, image: torch.fx.symbolic_trace(module),
    'make_fx': lambda module, image: make_fx(module)(image),
}


@pytest.mark.filterwarnings('ignore')  # of torch, about the ways in which it records
@pytest.mark.parametrize(
    'name, recorder, dtype',
    [
        *(('LKDN', recorder, torch.float32) for recorder in RECORDERS),
        ('SPAN in training form', 'jit.trace', torch.float32),
        ('LKDN', 'jit.trace', torch.bfloat16),
        ('LKDN with an identity', 'jit.trace', torch.bfloat16),
    ],
)
def test_what_is_recorded_is_the_network(needs_kernels, name, recorder, dtype):
    network = small_networks()[name]
    optimized = lora_sr.optimize(network, dtype)
    image, other = synthetic_image(1, 3, 17, 30), synthetic_image(1, 3, 17, 30).flip(3)
    recorded = RECORDERS[recorder](optimized, image)
    with torch.no_grad():
        expected, output = network(other), recorded(other)
    # Where torch runs the network in bfloat16, that is what is recorded.
    close = 5e-5 if optimized.engine == 'kernels' else 2e-2
    assert output.dtype == torch.float32
    assert ((output - expected).abs().max() / expected.abs().max()).item() < close


def test_operations_are_counted(needs_kernels):
    network = small_networks()['LKDN']
    counts = []
    for module in (network, lora_sr.optimize(network)):
        with FlopCounterMode(display=False) as counter:
            module(synthetic_image(1, 3, 16, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize('size', [(16, 16), (16, 24)])  # that of its buffers, and one that it makes masks for
@pytest.mark.parametrize(
    'through', [lambda module: module, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_swinir_runs_in_bfloat16(size, through):
    torch.manual_seed(0)
    network = SwinIR(
        img_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=4, upscale=2, upsampler='pixelshuffle'
    )
    optimized = through(lora_sr.optimize(randomized(network), torch.bfloat16))
    image = synthetic_image(1, 3, *size)
    with torch.no_grad():
        expected = network(image)
    assert ((optimized(image) - expected).abs().max() / expected.abs().max()).item() < 0.03
    attention = optimized.network.layers[0].residual_group.blocks[1].attn
    assert len(attention._forward_pre_hooks) == 1


def test_a_network_of_float32_alone_is_told_so():
    network = ECBSR(3, 3, num_block=1, num_channel=4, with_idt=False, act_type='relu', scale=2)
    with pytest.raises(InputError, match=r'must run in float32, for it makes .* got torch.bfloat16 \(.*BFloat16'):
        lora_sr.optimize(network, torch.bfloat16)(synthetic_image(1, 3, 12, 12))


def test_other_weights_can_be_loaded():
    first, second = (randomized(SPAN(feature_channels=6, upscale=2, deploy=True), seed) for seed in (1, 2))
    optimized, other = lora_sr.optimize(first), lora_sr.optimize(second)
    image = synthetic_image(1, 3, 12, 12)
    assert not torch.equal(optimized(image), other(image))
    optimized.load_state_dict(other.state_dict())
    assert torch.equal(optimized(image), other(image))


def to_zero(fast):
    for value in fast.parameters():
        value.zero_()


def by_vector(fast):
    torch.nn.utils.vector_to_parameters(
        torch.zeros(sum(value.numel() for value in fast.parameters())), fast.parameters()
    )


def load_inner(fast):
    fast.network.load_state_dict({name: value * 0 for name, value in fast.network.state_dict().items()})


def replace_all(fast):
    for module in fast.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                setattr(module, name, torch.nn.Parameter(torch.zeros_like(value), requires_grad=False))


@torch.no_grad()
@pytest.mark.parametrize(
    'network', [SPAN(feature_channels=8, upscale=2), EDSR(3, 3, num_feat=8, num_block=2, upscale=2)]
)
@pytest.mark.parametrize('change', [to_zero, by_vector, load_inner, replace_all])
def test_changed_weights_count(network, change):
    """In whatever way: an average that is swapped in, say."""
    network, image = randomized(copy.deepcopy(network)), torch.rand(1, 3, 16, 20)
    fast = lora_sr.optimize(network)
    before = fast(image)
    change(fast)
    assert torch.allclose(fast(image), fast.network(image), atol=1e-5) and not torch.allclose(
        fast(image), before, atol=1e-2
    )


@torch.no_grad()
def test_weights_of_one_call():
    network, image = randomized(SPAN(feature_channels=8, upscale=2)), torch.rand(1, 3, 16, 20)
    fast = lora_sr.optimize(network)
    before = fast(image)
    zeros = {name: torch.zeros_like(value) for name, value in fast.named_parameters()}
    assert torch.equal(torch.func.functional_call(fast, zeros, image), torch.zeros(1, 3, 32, 40))
    assert torch.equal(fast(image), before)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'cast', [lambda fast: fast.bfloat16(), lambda fast: fast.to(torch.bfloat16), lambda fast: fast.half()]
)
def test_weights_of_another_type(dtype, cast):
    """They are rounded to it; what computes stays as it was made."""
    network, image = randomized(SPAN(feature_channels=8, upscale=2)), torch.rand(1, 3, 16, 20)
    expected = network(image)
    found = cast(lora_sr.optimize(network, dtype))(image)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_refuses_what_is_no_network():
    with pytest.raises(InputError, match="not 'DSCF.pth'"):
        lora_sr.optimize('DSCF.pth')


def test_dtype_and_mode_stay():
    optimized = lora_sr.optimize(small_networks()['EDSR'])
    image = synthetic_image(1, 3, 12, 12)
    expected = optimized(image)
    assert not optimized.training
    output = optimized.half().train()(image)  # the weights have been in float16 then
    assert output.dtype == torch.float32 and torch.allclose(output, expected, atol=1e-2)
    assert not any(module.training for module in optimized.modules())


def test_nan_stays_nan(needs_kernels):
    network = small_networks()['SPAN in training form']
    image = synthetic_image(1, 3, 70, 70)
    image[0, 1, 35, 35] = torch.nan
    with torch.no_grad():
        expected = network(image).isnan()
    assert expected.any() and (lora_sr.optimize(network)(image).isnan() | ~expected).all()


@pytest.mark.parametrize('dtype, reason', [(torch.float64, 'not in torch.float64'), (torch.float16, 'is bfloat16')])
def test_refuses_a_dtype(dtype, reason):
    with pytest.raises(InputError, match=reason):
        lora_sr.optimize(small_networks()['EDSR'], dtype)


def images_of(shared, name):
    folder = shared / 'data' / 'benchmark' / name
    for path in sorted((folder / 'GTmod4').iterdir()):
        lr = cv2.imread(str(folder / 'LRbicx4' / path.name)) / np.float32(255)
        yield img2tensor(lr, bgr2rgb=True, float32=True)[None], cv2.imread(str(path))


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_weights(shared, needs_kernels, name):
    """The output to 1e-3, and 8-bit images equal on 99.99% of the values."""
    network = lora_sr.load_network(shared / 'weights' / f'{name}.pth')
    optimized = lora_sr.optimize(network)
    assert optimized.engine == 'kernels'
    equal, values = 0, 0
    for image, _ in images_of(shared, 'Set5'):
        with torch.no_grad():
            expected = network(image)
        output = optimized(image)
        assert (output - expected).abs().max() < 1e-3
        same = tensor2img(output) == tensor2img(expected)
        equal, values = equal + same.sum(), values + same.size
    assert equal / values > 0.9999


@pytest.mark.parametrize('name', OFFICIAL)
def test_golden_tensors(shared, name):
    golden = np.load(shared / 'golden' / 'networks' / f'{name.split("/")[1]}.npz')
    output = lora_sr.optimize(lora_sr.load_network(shared / 'weights' / f'{name}.pth'))(torch.from_numpy(golden['lr']))
    assert np.abs(output.numpy() - golden['sr']).max() < 1e-4


@pytest.mark.parametrize('name', OFFICIAL)
def test_bfloat16_loses_a_hundredth_of_a_decibel_at_most(shared, needs_bfloat16, name):
    network = lora_sr.load_network(shared / 'weights' / f'{name}.pth')
    forms = lora_sr.optimize(network), lora_sr.optimize(network, torch.bfloat16)
    losses = []
    for image, gt in images_of(shared, 'Set5'):
        exact, half = (
            calculate_psnr(tensor2img(form(image)), gt, crop_border=4, test_y_channel=True) for form in forms
        )
        losses.append(exact - half)
    assert 0 < np.mean(losses) <= 0.01


def test_mps_gets_contiguous_tensors():
    """Of slices of channels-last tensors it computes wrong values (pytorch issue 180984)."""
    formats = [deployed_module._memory_format(torch.device(kind)) for kind in ('cpu', 'cuda', 'mps')]
    assert formats == [torch.channels_last, torch.channels_last, torch.contiguous_format]


class Views(torch.nn.Module):
    """Written for tensors in rows, as spandrel's IPT is; and with a parameter of five dimensions, as FFTformer has."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.gains = torch.nn.Parameter(torch.rand(1, 4, 1, 1, 1))

    def forward(self, image):
        features = self.conv(image)
        batch, channels, height, width = features.shape
        features = features.view(batch, channels, height * width, 1) * self.gains[..., 0]
        return features[:, :3].view(batch, 3, height, width)


def test_views_of_rows_are_given_rows():
    network = Views().eval()
    fast = lora_sr.optimize(network)
    for height, width in ((16, 24), (17, 9)):
        image = torch.rand(2, 3, height, width)
        assert torch.allclose(fast(image), network(image), atol=1e-6)
    assert torch.allclose(copy.deepcopy(fast)(image), network(image), atol=1e-6)
