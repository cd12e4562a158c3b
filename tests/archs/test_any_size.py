"""Images of any size: against BasicSR's own padding for SwinIR, and against padding and cropping by hand."""

import copy
import gc

import numpy as np
import pytest
import torch
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from basicsr.models.swinir_model import SwinIRModel
from torch import nn
from torch.nn import functional as F

from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.archs import NetworkInfo, network_info, take_any_size
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.info import _probe
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import load_network


def swinir(window_size=8, **arguments):
    arguments = {'upscale': 2, 'upsampler': 'pixelshuffledirect', **arguments}
    torch.manual_seed(0)
    return SwinIR(
        img_size=2 * window_size,
        embed_dim=8,
        depths=[2],
        num_heads=[2],
        window_size=window_size,
        mlp_ratio=2,
        drop_path_rate=0.0,
        **arguments,
    ).eval()


class Shuffled(nn.Module):
    """Takes multiples of ``factor`` and gives images of their size; it keeps what it was called with last."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.seen = None

    def forward(self, x):
        self.seen = x
        return F.pixel_shuffle(F.pixel_unshuffle(x, self.factor), self.factor)


class UNet(nn.Module):
    """Halves the size three times and adds what it has halved to what it has doubled."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3))

    def forward(self, x):
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for skip in reversed(skips):
            x = F.interpolate(x, scale_factor=2) + skip
        return x


class Padded(nn.Module):
    """Pads by itself and crops nothing: the size of the output is no multiple of the input's where that is no 8's."""

    def forward(self, x):
        return F.interpolate(F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)), scale_factor=2)


class OnCPU(Shuffled):
    """Mixes the image with a tensor that does not move with the network."""

    def __init__(self, factor):
        super().__init__(factor)
        self.mean = torch.full((1, 3, 1, 1), 0.5)

    def forward(self, x):
        return super().forward(x - self.mean) + self.mean


class LooksAtValues(Shuffled):
    """Draws a random number, and does what its value says."""

    def forward(self, x):
        return super().forward(x) if torch.rand(1).item() < 2 else x


class MadeOnTheWay(Shuffled):
    """Multiplies by a mask that it makes without naming a device."""

    def forward(self, x):
        return super().forward(x * torch.ones(x.shape[2:]))


class Classifier(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize(
    'build, channels, multiple',
    [
        *((lambda x=x: swinir(upsampler='pixelshuffle', upscale=x), 3, 8) for x in (2, 3, 4)),
        (lambda: swinir(), 3, 8),
        (lambda: swinir(upsampler='nearest+conv', upscale=4, resi_connection='3conv'), 3, 8),
        (lambda: swinir(7, upsampler='', upscale=1), 3, 7),
        (lambda: swinir(7, upsampler='', upscale=1, in_chans=1), 1, 7),
        (lambda: swinir(in_chans=4), 4, 8),
        (lambda: swinir(5), 3, 5),
        (lambda: swinir(16), 3, 16),
        (lambda: RRDBNet(3, 3, 4, num_feat=8, num_block=1, num_grow_ch=4), 3, 1),
        (lambda: RRDBNet(3, 3, 2, num_feat=8, num_block=1, num_grow_ch=4), 3, 2),
        (lambda: RRDBNet(3, 3, 1, num_feat=8, num_block=1, num_grow_ch=4), 3, 4),
        (lambda: RRDBNet(1, 1, 1, num_feat=8, num_block=1, num_grow_ch=4), 1, 4),
        (lambda: EDSR(3, 3, num_feat=8, num_block=1), 3, 1),
        (lambda: RCAN(3, 3, num_feat=16, num_group=1, num_block=1), 3, 1),
        (lambda: MSRResNet(num_feat=8, num_block=1), 3, 1),
        (lambda: SRVGGNetCompact(num_feat=8, num_conv=1), 3, 1),
        (lambda: SPAN(feature_channels=6), 3, 1),
        (lambda: LKDN(num_feat=6, num_atten=4, num_block=1), 3, 1),
        (lambda: Shuffled(3), 3, 3),
        (lambda: Shuffled(48), 3, 48),
        (lambda: UNet(), 3, 8),
        (lambda: Padded(), 3, 8),
        (lambda: OnCPU(6), 3, 6),
        (lambda: LooksAtValues(12), 3, 12),
        (lambda: MadeOnTheWay(4), 3, 4),
        (lambda: take_any_size(Shuffled(4)), 3, 4),
    ],
)
def test_what_a_network_takes(build, channels, multiple):
    network = build().train()
    state = copy.deepcopy(network.state_dict())
    vars(network).pop('_network_info', None)  # of a network that was padded before
    attributes = dict(vars(network))
    random_state = torch.get_rng_state()
    info = network_info(network)
    assert (info.in_channels, info.size_multiple) == (channels, multiple)
    assert network_info(network) is info and vars(network).pop('_network_info') is info
    assert torch.equal(torch.get_rng_state(), random_state)
    assert network.training and vars(network) == attributes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    height, width = info.size(24, 40)
    with torch.no_grad():
        shape = network.eval()(torch.zeros(1, channels, height, width)).shape
    assert shape == (1, info.out_channels, height * info.scale, width * info.scale)


@pytest.mark.parametrize(
    'network',
    [
        SPAN(feature_channels=4, upscale=3),
        DSCLoRA(feature_channels=4, upscale=2),
        LKDN(num_feat=6, num_atten=4, num_block=1, upscale=2),
        LKDN(num_in_ch=1, num_out_ch=1, num_feat=6, num_atten=4, num_block=1),
    ],
    ids=lambda network: type(network).__name__,
)
def test_what_a_network_declares_is_what_trying_finds(network):
    assert network_info(network) == _probe(network) == network.declared_info()


def test_networks_that_take_nothing_in_multiples():
    for network in (Classifier(), Shuffled(65), nn.Linear(3, 3)):
        assert network_info(network) is None
    assert network_info(UNet()) == NetworkInfo(3, 3, 1, 8)


@torch.no_grad()
@pytest.mark.parametrize('size', [(13, 18), (16, 9), (31, 24), (5, 5)])
def test_the_output_is_that_of_basicsrs_own_model(size):
    network = swinir()
    model = SwinIRModel.__new__(SwinIRModel)
    model.opt, model.net_g = {'network_g': {'window_size': 8}, 'scale': 2}, copy.deepcopy(network)
    model.lq = torch.rand(2, 3, *size)
    model.test()
    output = take_any_size(network)(model.lq)
    assert output.shape == (2, 3, 2 * size[0], 2 * size[1]) and torch.equal(output, model.output)


@torch.no_grad()
@pytest.mark.parametrize('size', [(1, 1), (4, 20), (20, 3)])
def test_an_image_too_small_to_reflect_repeats_its_border(size):
    network = swinir()
    image = torch.rand(1, 3, *size)
    reflected = [(0, 0), (0, 0), *((0, min(-length % 8, length - 1)) for length in size)]
    padded = np.pad(image.numpy(), reflected, mode='reflect')
    rest = [(0, 0), (0, 0), *((0, -length % 8) for length in padded.shape[2:])]
    padded = torch.from_numpy(np.pad(padded, rest, mode='edge'))
    expected = network(padded)[:, :, : 2 * size[0], : 2 * size[1]]
    assert torch.equal(take_any_size(network)(image), expected)


@torch.no_grad()
def test_an_image_that_fits_passes_as_it_is():
    network = take_any_size(Shuffled(4))
    network(torch.rand(1, 3, 5, 6))
    assert network.seen.shape == (1, 3, 8, 8)
    image = torch.rand(1, 3, 8, 12)
    output = network(image)
    assert network.seen is image and torch.equal(output, image)
    assert output._base is None or output._base.shape == output.shape  # nothing was cropped


def test_a_network_that_takes_any_size_is_left_alone():
    network = take_any_size(MSRResNet(num_feat=8, num_block=1, upscale=2))
    assert not network._forward_pre_hooks and not network._forward_hooks


@torch.no_grad()
def test_once_more_is_the_same_and_another_multiple_replaces():
    network = Shuffled(4)
    image = torch.rand(1, 3, 9, 9)
    for arguments, size in (((), 12), ((), 12), ((16,), 16), ((20,), 20), ((), 12)):
        assert take_any_size(network, *arguments) is network
        assert network(image).shape == image.shape and network.seen.shape[2:] == (size, size)
    take_any_size(network, 1)
    with pytest.raises(RuntimeError):
        network(image)


@torch.no_grad()
def test_class_and_state_dict_stay_and_a_copy_pads_for_itself():
    network = swinir()
    keys = list(network.state_dict())
    image = torch.rand(1, 3, 11, 13)
    expected = take_any_size(network)(image)
    assert type(network) is SwinIR and list(network.state_dict()) == keys
    other = copy.deepcopy(network)
    del network
    gc.collect()
    assert torch.equal(other(image), expected)
    assert torch.equal(swinir().state_dict()[keys[0]], other.state_dict()[keys[0]])


@torch.no_grad()
def test_replicas_keep_their_sizes_apart():
    network = take_any_size(Shuffled(4))
    network(torch.rand(1, 3, 8, 8))
    before = dict(vars(network))
    first, second = (network._replicate_for_data_parallel() for _ in range(2))
    outputs = []

    def forward(x):
        if second.seen is None or second.seen.shape[-1] != 12:  # the other replica runs in the midst of this one
            outputs.append(second(torch.rand(1, 3, 9, 11)))
        return Shuffled.forward(first, x)

    first.forward = forward
    outputs.append(first(torch.rand(1, 3, 5, 6)))
    assert [output.shape[2:] for output in outputs] == [(9, 11), (5, 6)]
    assert vars(network) == before


def test_distributed_training(tmp_path):
    network, plain = (swinir().train() for _ in range(2))
    add_lora(take_any_size(network), LoRAConfig(['.*attn.*']))
    image, target = torch.rand(2, 3, 11, 14), torch.rand(2, 3, 22, 28)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        output = nn.parallel.DistributedDataParallel(network)(image)
        F.l1_loss(output, target).backward()
    finally:
        torch.distributed.destroy_process_group()
    expected = plain(F.pad(image, (0, 2, 0, 5), 'reflect'))[:, :, :22, :28]
    F.l1_loss(expected, target).backward()
    assert torch.equal(output, expected)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@torch.no_grad()
@pytest.mark.parametrize('lora', [False, True])
def test_what_is_loaded_takes_any_size(tmp_path, lora):
    network = swinir()
    if lora:
        add_lora(network, LoRAConfig(groups=['all'], rank=2, also_train=['position']))
    torch.save(network.state_dict(), tmp_path / 'net.pth')
    image = torch.rand(1, 3, 9, 21)
    expected = network(F.pad(image, (0, 3, 0, 7), 'reflect'))[:, :, :18, :42]
    assert torch.equal(load_network(tmp_path / 'net.pth')(image), expected)
