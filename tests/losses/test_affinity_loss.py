"""The blockwise affinity loss: against the naive formula, and within its memory."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from lora_sr.errors import InputError
from lora_sr.losses import affinity as affinity_loss
from lora_sr.losses.affinity import SpatialAffinityLoss, spatial_affinity_distance


def naive(student, teacher):
    """The formula, word for word, with both (HW, HW) matrices."""
    affinity = []
    for features in (student, teacher):
        unit = F.normalize(features.flatten(2), dim=1)
        affinity.append(unit.transpose(1, 2) @ unit)
    return (affinity[0] - affinity[1]).abs().mean()


@pytest.mark.parametrize('of_gpu', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape, teacher_channels', [((3, 5, 6, 7), 9), ((1, 8, 25, 31), 8), ((3, 4, 1, 1), 2)])
def test_value_and_gradient_equal_the_naive_form(monkeypatch, dtype, shape, teacher_channels, of_gpu):
    block_size = affinity_loss._block_size
    monkeypatch.setattr(affinity_loss, 'ROWS', 128)  # several blocks, the last one short
    monkeypatch.setattr(affinity_loss, 'GPU_BUFFER_ELEMENTS', 2000)  # two samples of 6 x 7 at a time
    monkeypatch.setattr(
        affinity_loss, '_block_size', lambda samples, positions, _: block_size(samples, positions, of_gpu)
    )
    torch.manual_seed(0)
    student = torch.randn(shape, dtype=dtype, requires_grad=True)
    teacher = torch.randn(shape[0], teacher_channels, *shape[2:], dtype=dtype)
    wide = student.detach().double().requires_grad_()
    expected = naive(wide, teacher.double())
    (expected_grad,) = torch.autograd.grad(expected, wide)
    value = spatial_affinity_distance(student, teacher)
    (grad,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    assert value.dtype == dtype
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm() + 1e-7


def test_channels_last_features_and_upstream_gradient():
    torch.manual_seed(0)
    base = torch.randn(2, 6, 8, 9, dtype=torch.float64)
    teacher = torch.randn(2, 3, 8, 9, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    grads = []
    for loss in (naive, spatial_affinity_distance):
        student = base.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        (3 * loss(student, teacher)).backward()
        grads.append(student.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 6, 7).to(dtype).requires_grad_(), torch.randn(1, 4, 6, 7)
    expected, value = naive(student.float(), teacher), spatial_affinity_distance(student, teacher)
    torch.testing.assert_close(value, expected)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (value, expected)]
    torch.testing.assert_close(*grads)


def test_autocast_does_not_round_the_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 6, 7, requires_grad=True), torch.randn(1, 4, 6, 7)
    (expected,) = torch.autograd.grad(naive(student, teacher), student)
    with torch.autocast('cpu', torch.bfloat16):
        value = spatial_affinity_distance(student, teacher)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected)


def test_equal_features_give_exactly_zero():
    features = torch.randn(2, 7, 9, 11, requires_grad=True)
    loss = spatial_affinity_distance(features, features.detach())
    loss.backward()
    assert loss == 0 and not features.grad.any()


def test_loss_averages_over_layers_and_has_a_weight():
    torch.manual_seed(0)
    pairs = [(torch.randn(1, 4, 5, 6), torch.randn(1, 8, 5, 6)), (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))]
    students, teachers = map(list, zip(*pairs))
    expected = 0.7 * sum(naive(s, t) for s, t in pairs) / 2
    torch.testing.assert_close(SpatialAffinityLoss(0.7)(students, teachers), expected)


def test_features_that_do_not_fit():
    with pytest.raises(InputError, match=r"student's are \(1, 4, 5, 6\) and the teacher's \(1, 4, 6, 5\)"):
        spatial_affinity_distance(torch.zeros(1, 4, 5, 6), torch.zeros(1, 4, 6, 5))
    for shape in ((0, 4, 5, 6), (1, 4, 0, 6)):
        with pytest.raises(InputError, match='Spatial affinity compares'):
            spatial_affinity_distance(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(InputError, match='as many layers'):
        SpatialAffinityLoss()([torch.zeros(1, 4, 5, 6)], [])


@pytest.mark.parametrize(
    'samples, side, is_gpu, expected',
    [
        (4, 64, False, (2, 512)),
        (4, 64, True, (4, 2048)),  # half of all rows
        (64, 48, True, (12, 1152)),
        (2, 128, True, (1, 2048)),  # as many as the buffer holds
        (2, 128, False, (1, 256)),
        (1, 1, True, (1, 1)),
        (1, 6000, True, (1, 1)),
    ],
)
def test_blocks_fill_the_memory_they_may_use(samples, side, is_gpu, expected):
    assert affinity_loss._block_size(samples, side**2, is_gpu) == expected


@pytest.mark.slow
def test_memory_stays_within_100_mb_beyond_the_inputs():
    from lora_sr.benchmarks.affinity import measure_peak_memory

    ours, whole = measure_peak_memory('blockwise'), measure_peak_memory('naive')
    assert ours <= 100e6 < whole


@pytest.mark.slow
def test_benchmark_prints_the_ratios():
    result = subprocess.run(
        [sys.executable, '-m', 'lora_sr.cli.main', 'bench', 'affinity', '--size', '16'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'naive / blockwise' in result.stdout
