"""What trains of a network, and in which batches."""

import pytest
import torch
from torch import nn

import lora_sr
from lora_sr.adapt import plan
from lora_sr.adapt.plan import batches_for, lora_for
from lora_sr.adapters import LoRAConfig, add_lora, count_parameters
from lora_sr.archs import LKDN, SPAN, SPANV2, network_info
from lora_sr.errors import InputError


def share_of(network, section):
    counts = count_parameters(add_lora(network, LoRAConfig.from_dict(section)))
    return counts.lora, counts.lora / (counts.total - counts.lora)


@pytest.mark.parametrize('share', [None, 0.05, 0.2, 1.0])
@pytest.mark.parametrize(
    'make',
    [lambda: SPAN(feature_channels=28, deploy=True), lambda: LKDN(num_feat=24, num_block=3), lambda: SPANV2()],
    ids=['SPAN', 'LKDN', 'SPANV2'],
)
def test_the_largest_rank_within_a_share(make, share):
    network = make()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        section, trained = lora_for(network, share)
    except InputError as error:
        assert share == 0.05 and 'at which LoRA has rank 1, got 5%' in str(error)
        return
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    count, found = share_of(make(), section)
    assert count == trained and (found <= (share or 0.1) or (share is None and section['rank'] == 1 and found < 0.15))
    if section['rank'] < plan.LARGEST_RANK:
        more = {**section, 'rank': section['rank'] + 1, 'alpha': section['rank'] + 1}
        assert share_of(make(), more)[1] > (share or 0.1)


def test_depthwise_layers_stay_as_they_are():
    network = LKDN(num_feat=24, num_block=3)
    section, _ = lora_for(network, 0.2)
    add_lora(network, LoRAConfig.from_dict(section))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert hasattr(module, 'lora_A') == (module.groups == 1), name


def test_names_that_do_not_tell_depthwise_layers():
    inner = (nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=groups)) for groups in (8, 1))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), *inner)
    section, _ = lora_for(network, None)
    assert section['exclude_modules'] == ['1', r'2\.1']


def test_no_layer_to_adapt():
    with pytest.raises(InputError, match='no layer that can carry LoRA'):
        lora_for(nn.PReLU(), None)


def test_batches_fit_the_time_and_the_images(monkeypatch):
    network = SPAN(feature_channels=8, deploy=True, upscale=2)
    monkeypatch.setattr(plan, '_seconds', lambda run: run() or 0.001)  # of 4 patches of 32x32
    lora, _ = lora_for(network, None)
    info = network_info(network)
    found = batches_for(network, lora, info, 300, 65)
    assert (found.batch, found.side) == (16, 64)
    found = batches_for(network, lora, info, 40, 65)
    assert (found.batch, found.side) == (8, 32)
    found = batches_for(network, lora, info, 300, 7)
    assert (found.batch, found.side) == (4, 32) and found.seconds_per_pixel == pytest.approx(0.001 / 32**2)
    found = batches_for(network, lora, info, 300, 0.001)
    assert (found.batch, found.side) == (1, 24)


@pytest.mark.parametrize(
    ('seconds', 'step', 'validation', 'iterations', 'validations'),
    [
        (500, 0.1, 2, 4760, 12),
        (500, 0.1, 25, 4250, 3),  # 15% of the time, and no more
        (20, 1, 0.1, 18, 4),  # so few iterations that 12 validations would be most of them
        (20, 15, 10, 1, 1),
        (20, 100, 100, 1, 1),  # one of each at least
    ],
)
def test_a_schedule_fills_the_time(seconds, step, validation, iterations, validations):
    found = plan.schedule_for(seconds, step, validation)
    assert (found.iterations, found.validations) == (iterations, validations)


def test_patches_are_whole_windows():
    network = lora_sr.archs.take_any_size(_Windows())
    lora, _ = lora_for(network, 1.0)
    assert batches_for(network, lora, network_info(network), 300, 1e-9).side == 28


class _Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h // 7, 7, w // 7, 7).view(n, c, h, w)
        return self.shuffle(self.conv(x))
