"""Training on a GPU: adapted networks, the affinity loss, and whole runs through BasicSR."""

import re

import pytest
import torch
import yaml
from basicsr.archs.edsr_arch import EDSR
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from tiny_run import TINY_OPTIONS, run_python
from torch.nn import functional as F

from lora_sr.adapters import LoRAConfig, add_lora, merge_lora
from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN
from lora_sr.basicsr.integer_images import with_floats
from lora_sr.benchmarks.affinity import naive_affinity_distance
from lora_sr.losses.affinity import spatial_affinity_distance
from lora_sr.optim import Adan

COMMAND = ('-m', 'lora_sr.train', '-opt', 'run.yml')
EDSR_OPTIONS = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2, 'upscale': 2}
NETWORKS = {
    'AdaptSR': lambda: AdaptSR({'type': 'EDSR', **EDSR_OPTIONS}, {'groups': ['all'], 'rank': 2}),
    'DSCLoRA': lambda: DSCLoRA(feature_channels=8, upscale=2, rank=2),
    'add_lora': lambda: add_lora(EDSR(**EDSR_OPTIONS), LoRAConfig(['body.*'], rank=2)),
}


def adapted(name, device):
    torch.manual_seed(0)
    return NETWORKS[name]().to(device)


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('name', NETWORKS)
def test_steps_change_what_is_trained_and_nothing_else(device, name, half):
    network = adapted(name, device)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    optimizer = Adan([parameter for parameter in network.parameters() if parameter.requires_grad], lr=1e-3)
    image, target = torch.rand(2, 3, 16, 16, device=device), torch.rand(2, 3, 32, 32, device=device)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = network(image)
        loss = F.l1_loss(output.float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and changed <= trained


@pytest.mark.parametrize('name', NETWORKS)
def test_merging_is_exact(device, name):
    network = adapted(name, device).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
        image = torch.rand(1, 3, 12, 10, dtype=torch.float64, device=device)
        expected = network(image)
        merge_lora(network)
        assert not any('lora' in key for key in network.state_dict())
        assert (network(image) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize('shape', [(3, 12, 48, 40), (2, 8, 1, 1)])
def test_affinity_equals_the_naive_form(device, shape):
    torch.manual_seed(0)
    features, teacher = torch.randn(2, *shape, dtype=torch.float64, device=device)
    values, gradients = [], []
    for dtype, form in ((torch.float64, naive_affinity_distance), (torch.float32, spatial_affinity_distance)):
        student = features.to(dtype).requires_grad_()
        values.append(form(student, teacher.to(dtype)))
        gradients.append(torch.autograd.grad(values[-1], student)[0].double())
    torch.testing.assert_close(values[1].double(), values[0], rtol=1e-5, atol=1e-7)
    assert (gradients[1] - gradients[0]).norm() <= 1e-4 * gradients[0].norm() + 1e-6
    assert spatial_affinity_distance(features.float(), features.float()) == 0


@pytest.mark.gpu
def test_affinity_needs_a_third_of_the_naive_memory():
    from lora_sr.benchmarks.affinity import measure_cuda_memory

    assert 3 * measure_cuda_memory('blockwise') <= measure_cuda_memory('naive')


@pytest.mark.slow
def test_distillation_run_and_resume(device, pairs, tmp_path):
    torch.manual_seed(0)
    torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), tmp_path / 'student.pth')
    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    options = yaml.safe_load(TINY_OPTIONS.format(root=pairs, suffix='.lmdb', backend='lmdb').replace('1e-3', '0.001'))
    options.update(
        model_type='DistillationModel',
        num_gpu=int(device.type == 'cuda'),
        network_g={'type': 'DSCLoRA', 'feature_channels': 6, 'upscale': 2, 'rank': 2},
        network_t={'type': 'SPAN', 'feature_channels': 8, 'upscale': 2},
        path={'pretrain_network_g': 'student.pth', 'param_key_g': None, 'pretrain_network_t': 'teacher.pth'},
    )
    prefetch = device.type  # CUDAPrefetcher, or CPUPrefetcher
    options['datasets']['train'].update(prefetch_mode=prefetch, num_prefetch_queue=1, pin_memory=True)
    options['train'].update(
        total_iter=8,
        ema_decay=0.9,
        distill_pixel_opt={'type': 'MSELoss', 'loss_weight': 1.0},
        affinity_opt={'type': 'SpatialAffinityLoss', 'loss_weight': 0.1, 'layers': ['block_1', 'block_6']},
    )
    options['logger']['save_checkpoint_freq'] = 5
    (tmp_path / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    first = run_python(*COMMAND, '--force_yml', 'train:total_iter=5', cwd=tmp_path).stderr
    assert iterations(first) == [1, 2, 3, 4, 5] and f'Use {prefetch} prefetch' in first
    second = run_python(*COMMAND, '--auto_resume', cwd=tmp_path).stderr
    assert iterations(second) == [6, 7, 8]
    assert 'Resuming training from epoch' in second and (tmp_path / 'experiments/tiny/models/net_g_latest.pth').exists()


def iterations(log) -> list:
    return [int(number) for number in re.findall(r'iter:\s*(\d+), lr:', log)]


@pytest.mark.parametrize(('kind', 'peak'), [(torch.uint8, 255), (torch.uint16, 65535)])
def test_whole_numbers_become_floats_as_on_a_cpu(device, kind, peak):
    """Rounded once: CUDA would multiply by the reciprocal of a number."""
    values = torch.arange(peak + 1, dtype=torch.int32).reshape(1, 1, -1, 16)
    given = with_floats({'lq': values.to(kind)}, device)['lq']
    assert torch.equal(given.cpu(), (values.double() / peak).float())


def test_prefetched_batches_are_those_of_the_loader(device):
    """Also while the training still computes with one as the next ones are copied."""
    if device.type != 'cuda':
        pytest.skip('CUDAPrefetcher needs CUDA')
    batches = [{'lq': torch.randint(0, 256, (4, 3, 256, 256), dtype=torch.uint8).pin_memory()} for _ in range(12)]
    expected = [batch['lq'].double().div(255).float() for batch in batches]
    prefetcher = CUDAPrefetcher(batches, {'num_gpu': 1})
    seen = []
    busy = torch.rand(2048, 2048, device=device)
    for _ in batches:
        batch = prefetcher.next()
        for _ in range(20):
            busy = busy @ busy / 2048
        seen.append(batch['lq'] + 0 * busy[0, 0])  # after the products, which the host does not wait for
        del batch
    assert prefetcher.next() is None
    for given, wanted in zip(seen, expected):
        assert torch.equal(given.cpu(), wanted)
