"""The keys of `train:` that say how a step runs, on a GPU: against the same model without them."""

import re

import pytest
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_run import TINY_OPTIONS, run_python
from tiny_steps import ConvDiscriminator, assert_near, built, step_options, steps, validated, weights

from lora_sr.checkpoints.content import read_checkpoint

FALLS = {'type': 'MultiStepLR', 'milestones': [8, 20, 35], 'gamma': 0.5}
ADAN = {'type': 'Adan', 'lr': 1e-3, 'weight_decay': 0.02}
# Of a model, keys of train, and how many kinds of steps are recorded.
RECORDED = {
    'SRModel': ('SRModel', {}, 1),
    'Adan': ('SRModel', {'optim_g': ADAN}, 1),
    'random paths': ('SwinIRModel', {}, 1),
    'parts of a batch': ('DistillationModel', {'accumulate_iter': 2, 'clip_grad_norm': 1.0}, 1),
    'two networks': ('RealESRGANModel', {'net_d_iters': 2, 'net_d_init_iters': 6}, 2),
    'bf16': ('SRModel', {'amp': 'bf16', 'memory_format': 'channels_last'}, 1),
    'fp16': ('SRModel', {'amp': 'fp16', 'clip_grad_norm': 1.0}, 1),
    'fp16, two networks': ('RealESRGANModel', {'amp': 'fp16'}, 1),
}


@pytest.fixture(autouse=True)
def discriminator():
    ARCH_REGISTRY.register(ConvDiscriminator)
    yield
    del ARCH_REGISTRY._obj_map['ConvDiscriminator']


@pytest.fixture
def options(device, tmp_path):
    """A function: the options of a small model on the device, in a folder of its own."""

    def make(model, **train):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return {**step_options(folder, model, **train), 'num_gpu': int(device.type == 'cuda')}

    return make


@pytest.fixture
def exact():
    """Convolutions that give the same each time, in all bits of float32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    wanted = ((cudnn, 'deterministic', True), (cudnn, 'benchmark', False), (cudnn, 'allow_tf32', False))
    wanted += ((matmul, 'allow_tf32', False),)
    before = [getattr(place, name) for place, name, _ in wanted]
    for place, name, value in wanted:
        setattr(place, name, value)
    yield
    for (place, name, _), value in zip(wanted, before):
        setattr(place, name, value)


@pytest.mark.gpu
@pytest.mark.parametrize('case', RECORDED)
def test_recorded_steps_are_those_without(device, options, exact, case, basicsr_log):
    """Fifty of them: rates that fall, averages, kinds of steps, and scales of losses."""
    if device.type == 'cpu':
        pytest.skip('tests/basicsr/step/test_graph.py pretends graphs')
    kind, train, count = RECORDED[case]
    train = {**train, 'scheduler': FALLS}
    plain, model = built(options(kind, **train)), built(options(kind, **train, graph=True))
    expected, losses = steps(plain, 1, 50), steps(model, 1, 50)
    assert 'train.graph' not in basicsr_log.text
    assert len(model.training_step._graph._recorded) == count
    assert_near(losses, expected, 1e-5 if 'amp' not in train and 'GAN' not in kind else 1e-3)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(validated(model), validated(plain), rtol=1e-3, atol=1e-3)
    if train.get('amp') == 'fp16':
        assert model.training_step.scaler.get_scale() == plain.training_step.scaler.get_scale()


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_without(device, options, exact, basicsr_log, monkeypatch):
    """A recording that fails leaves neither its stream nor half a step behind."""
    if device.type == 'cpu':
        pytest.skip('a CPU records nothing')
    train = {'amp': 'fp16', 'clip_grad_norm': 1.0}
    plain, model = built(options('SRModel', **train)), built(options('SRModel', **train, graph=True))
    optimize = model.training_step._optimize

    def wait(iteration):
        optimize(iteration)
        model.lq.sum().item()

    model.training_step._optimize = wait
    assert_near(steps(model, 1, 8), steps(plain, 1, 8), 1e-3)
    assert 'train.graph: the step could not be recorded' in basicsr_log.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
@pytest.mark.parametrize('kind', ['SRModel', 'SwinIRModel', 'DistillationModel', 'RealESRGANModel'])
def test_mixed_precision(device, options, kind, amp):
    model = built(options(kind, amp=amp))
    if amp == 'fp16':
        model.training_step.scaler.load_state_dict({**model.training_step.scaler.state_dict(), 'scale': 256.0})
    expected = steps(built(options(kind)), 1, 6)
    assert_near(steps(model, 1, 6), expected, {'bf16': 3e-2, 'fp16': 1e-2}[amp])
    assert all(value.dtype == torch.float32 for value in weights(model).values() if value.is_floating_point())
    assert validated(model).dtype == torch.float32


@pytest.mark.parametrize('kind', ['SRModel', 'DistillationModel'])
def test_blocks_are_compiled(device, options, exact, kind):
    backend = {'backend': 'inductor' if device.type == 'cuda' else 'eager'}
    expected = steps(built(options(kind)), 1, 4)
    assert_near(steps(built(options(kind, compile=backend)), 1, 4), expected, 1e-4)


@pytest.mark.parametrize('kind', ['SRModel', 'SwinIRModel', 'RealESRGANModel'])
def test_channels_last(device, options, exact, kind):
    model = built(options(kind, memory_format='channels_last'))
    assert_near(steps(model, 1, 6), steps(built(options(kind)), 1, 6), 1e-3)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in model.net_g.parameters()
               if value.ndim == 4)  # fmt: skip


@pytest.mark.parametrize('optimizer', ['Adam', 'AdamW', 'Adan'])
def test_a_run_resumes_with_the_optimizer_of_its_device(device, options, exact, optimizer):
    """Fused on a GPU, and counting there where steps are recorded: whatever the run that was saved had."""
    train = {'optim_g': {'type': optimizer, 'lr': 1e-3}}
    whole = built(options('SRModel', **train))
    expected = steps(whole, 1, 8)
    opt = options('SRModel', **train)
    first = built(opt)
    steps(first, 1, 4)
    first.save(0, 4)
    state = dict(read_checkpoint(f'{opt["path"]["training_states"]}/4.state'))
    opt['path'].update(pretrain_network_g=f'{opt["path"]["models"]}/net_g_4.pth', param_key_g='params')
    for saved in ({}, {'fused': True, 'capturable': True}, {'fused': False, 'capturable': False, 'foreach': True}):
        groups = [{**group, **{key: saved[key] for key in saved if key in group}}
                  for group in state['optimizers'][0]['param_groups']]  # fmt: skip
        model = built({**opt, 'train': {**opt['train'], 'graph': device.type == 'cuda' and 'fused' in saved}}, seed=1)
        own = {key: model.optimizer_g.param_groups[0].get(key) for key in ('fused', 'capturable', 'foreach')}
        model.resume_training({**state, 'optimizers': [{**state['optimizers'][0], 'param_groups': groups}]})
        assert {key: model.optimizer_g.param_groups[0].get(key) for key in own} == own
        assert bool(own['fused']) == (device.type == 'cuda' and optimizer != 'Adan')
        assert_near(steps(model, 5, 8), expected[4:], 1e-5)


@pytest.mark.slow
def test_one_process_of_several(device, pairs, tmp_path):
    """DistributedDataParallel with NCCL, or with gloo on a CPU."""
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    options = yaml.safe_load(TINY_OPTIONS.format(root=pairs, suffix='.lmdb', backend='lmdb').replace('1e-3', '0.001'))
    options.update(num_gpu=int(device.type == 'cuda'), dist_params={'backend': backend})
    options['train'].update(amp='bf16', accumulate_iter=2, ema_decay=0.9)
    (tmp_path / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1', '-m', 'lora_sr.train']
    done = run_python(*launcher, '-opt', 'run.yml', '--launcher', 'pytorch', cwd=tmp_path)
    assert 'DistributedDataParallel' in done.stderr
    assert [int(number) for number in re.findall(r'iter:\s*(\d+), lr:', done.stderr)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / 'experiments/tiny/models/net_g_latest.pth').exists()
