"""Adan: the authors' trajectory, Algorithm 1 element by element, states and resumption, and wrong values."""

import io
import math

import adan_pytorch
import numpy as np
import pytest
import torch
import yaml
from tiny_run import TINY_OPTIONS, logged, run_python, write_pairs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_sr.basicsr.patches.optimizers import find_optimizer
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import InputError
from lora_sr.optim import Adan

BETAS = (0.98, 0.92, 0.99)
OPTIONS = {'lr': 5e-3, 'betas': BETAS, 'eps': 1e-8}
SHAPES = [(3, 2, 3, 3), (3,), (), (4, 5)]


def make_params(seed=0, dtype=torch.float64, shapes=SHAPES) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params, seed, skipped=()) -> None:
    """Give all parameters random gradients, but none to those with an index in `skipped`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        param.grad = None if index in skipped else gradient


def take_steps(optimizer, params, steps) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def are_equal(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


# --- the trajectory ---


FORMS = pytest.mark.parametrize('form', [{'foreach': True}, {'foreach': False}, {'capturable': True}])


@FORMS
@pytest.mark.parametrize(('weight_decay', 'name'), [(0, 'official_wd0'), (0.02, 'official_wd002')])
def test_trajectory_of_the_authors_code(shared, weight_decay, name, form):
    golden = np.load(shared / 'golden' / 'adan.npz')
    rows = [nn.Parameter(torch.tensor(row)) for row in golden['p0']]  # a tensor for each row
    optimizer = Adan(rows, weight_decay=weight_decay, **form, **OPTIONS)
    for gradient, expected in zip(golden['grads'], golden[name]):
        for row, part in zip(rows, gradient):
            row.grad = torch.tensor(part)
        optimizer.step()
        assert np.abs(torch.stack(rows).detach().numpy() - expected).max() < 1e-6


def reference(value, gradients, rates, betas, eps, weight_decay) -> float:
    """Algorithm 1 of the paper for one number, with its 1 - beta written as beta, and corrected for the start at 0.

    A gradient of None stands for a step that does not reach it.
    """
    beta1, beta2, beta3 = betas
    m = v = n = 0.0
    count, before = 0, None
    for gradient, lr in zip(gradients, rates):
        if gradient is None:
            continue
        count += 1
        difference = 0.0 if before is None else gradient - before
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * difference
        n = beta3 * n + (1 - beta3) * (gradient + beta2 * difference) ** 2
        rate = lr / (math.sqrt(n / (1 - beta3**count)) + eps)
        value -= rate * (m / (1 - beta1**count) + beta2 * v / (1 - beta2**count))
        value /= 1 + lr * weight_decay
        before = gradient
    return value


@FORMS
def test_algorithm_of_the_paper(form):
    """Two groups with options of their own, a scheduler, and gradients that come late, pause, or never come."""
    params = make_params(shapes=[*SHAPES, (2, 2)])
    start = [param.detach().clone() for param in params]
    own = {'betas': [0.5, 0.0, 0.8], 'eps': 1e-3, 'weight_decay': 0.3}
    optimizer = Adan([{'params': params[:2]}, {'params': params[2:], **own}], **form, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 9], gamma=0.1)
    skipped = [{4}, {4}, {0, 4}, {1, 2, 4}, {4}, {0, 1, 2, 3, 4}, {3, 4}, {4}, {0, 4}, {4}, {4}, {4}]
    skipped = [{2, *indices} if step < 2 else indices for step, indices in enumerate(skipped)]
    rates, gradients = [], []
    for step, indices in enumerate(skipped):
        set_gradients(params, step, indices)
        rates.append(optimizer.param_groups[0]['lr'])
        gradients.append([param.grad for param in params])
        copies = [None if grad is None else grad.clone() for grad in gradients[-1]]
        optimizer.step()
        scheduler.step()
        assert all(grad is copy or torch.equal(grad, copy) for grad, copy in zip(gradients[-1], copies))
    assert rates == pytest.approx([5e-3] * 5 + [5e-4] * 4 + [5e-5] * 3)
    for index, (param, before) in enumerate(zip(params, start)):
        values = OPTIONS if index < 2 else own
        for place in np.ndindex(*param.shape):
            seen = [None if grads[index] is None else grads[index][place].item() for grads in gradients]
            expected = reference(
                before[place].item(), seen, rates, values['betas'], values['eps'], values.get('weight_decay', 0)
            )
            assert param[place].item() == pytest.approx(expected, rel=0, abs=1e-13)
    assert torch.equal(params[4], start[4]) and params[4] not in optimizer.state
    steps = [optimizer.state[param]['step'] for param in params[:4]]
    assert steps == [sum(index not in indices for indices in skipped) for index in range(4)]


def test_first_step_moves_by_the_rate_unlike_adan_pytorch():
    ours, theirs = make_params(), make_params()
    for params, optimizer in ((ours, Adan(ours, lr=0.1)), (theirs, adan_pytorch.Adan(theirs, lr=0.1))):
        take_steps(optimizer, params, [0])
    start = make_params()
    assert are_equal(theirs, start)
    for param, before in zip(ours, start):
        torch.testing.assert_close(before - param, 0.1 * param.grad.sign(), rtol=0, atol=1e-6)


def test_updates_tensors_together_by_kind_and_step(monkeypatch):
    """A batch is one call for all tensors of a type that have taken as many steps; a call each without `foreach`."""
    batches = []
    original = torch._foreach_sub
    monkeypatch.setattr(torch, '_foreach_sub', lambda *args: batches.append(list(args[0])) or original(*args))

    def sizes(params, skipped=(), **options):
        optimizer = Adan(params, **options)
        set_gradients(params, 0, skipped)
        optimizer.step()
        set_gradients(params, 1)
        batches.clear()
        optimizer.step()
        assert all(len({(grad.device, grad.dtype) for grad in batch}) == 1 for batch in batches)
        return sorted(len(batch) for batch in batches)

    assert sizes(make_params()) == [4]
    assert sizes(make_params() + make_params(dtype=torch.float32, shapes=[(2,)])) == [1, 4]
    assert sizes(make_params(), skipped=(1, 3)) == [2, 2]
    assert sizes(make_params(), foreach=False) == [1, 1, 1, 1]
    assert sizes(make_params(), capturable=True) == [4]
    assert sizes(make_params(), skipped=(1, 3), capturable=True) == [2, 2]


def test_foreach_changes_no_bit():
    together, apart = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    for params, foreach in ((together, True), (apart, False)):
        take_steps(Adan(params, weight_decay=0.02, foreach=foreach), params, range(20))
    assert are_equal(together, apart)


def test_closure():
    params = make_params()
    optimizer = Adan(params, lr=0.1)
    start = [param.detach().clone() for param in params]

    def closure():
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[0] == pytest.approx(sum(param.square().sum().item() for param in start))
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.step() is None


def test_sparse_gradient_is_refused():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r'dense gradients, but that of a parameter of shape \(10, 3\) is sparse'):
        Adan(embedding.parameters()).step()


def test_state_has_the_memory_format_of_the_parameter():
    convolution = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    convolution(torch.ones(1, 4, 8, 8)).sum().backward()
    optimizer = Adan(convolution.parameters())
    optimizer.step()
    state = optimizer.state[convolution.weight]
    assert all(state[name].stride() == convolution.weight.stride() for name in ('prev_grad', 'm', 'v', 'n'))


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU is waited."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_capturable_step_reads_no_number():
    params = make_params()
    optimizer = Adan(params, weight_decay=0.02, capturable=True)
    take_steps(optimizer, params, range(1))
    optimizer.param_groups[0]['lr'] = torch.tensor(1e-2, dtype=torch.float64)
    set_gradients(params, 1)
    with Reads() as reads:
        optimizer.step()
        assert reads.count == 0
        params[0].sum().item()
    assert reads.count == 1


@pytest.mark.gpu
@pytest.mark.parametrize('capturable', [False, True])
def test_on_a_gpu(capturable):
    here, there = make_params(), [nn.Parameter(param.detach().cuda()) for param in make_params()]
    optimizers = [Adan(params, weight_decay=0.02) for params in (here, there)]
    optimizers[1].param_groups[0]['capturable'] = capturable
    for step in range(20):
        set_gradients(here, step)
        for param, other in zip(here, there):
            other.grad = param.grad.cuda()
        optimizers[0].step()
        torch.cuda.set_sync_debug_mode('error')  # any wait for the GPU is an error
        try:
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    for param, other in zip(here, there):
        torch.testing.assert_close(other.cpu(), param, rtol=0, atol=1e-12)


# --- states ---


def test_state_dict():
    params = make_params()
    optimizer = Adan(params, weight_decay=0.02)
    take_steps(optimizer, params, range(3))
    state = optimizer.state_dict()
    options = {key: value for key, value in state['param_groups'][0].items() if key != 'params'}
    assert options == {
        'lr': 1e-3,
        'betas': BETAS,
        'eps': 1e-8,
        'weight_decay': 0.02,
        'foreach': True,
        'capturable': False,
    }
    names = {'step', 'prev_grad', 'm', 'v', 'n'}  # adan_pytorch's
    assert set(state['state']) == {0, 1, 2, 3} and all(set(one) == names for one in state['state'].values())
    assert [one['step'] for one in state['state'].values()] == [3] * 4
    assert are_equal([one['prev_grad'] for one in state['state'].values()], [param.grad for param in params])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_resumes_bit_for_bit(dtype):
    whole = make_params(dtype=dtype)
    take_steps(Adan(whole, lr=1e-2, weight_decay=0.02), whole, range(12))

    params = make_params(dtype=dtype)
    optimizer = Adan(params, lr=1e-2, weight_decay=0.02)
    take_steps(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save({'params': params, 'optimizer': optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [nn.Parameter(param.detach()) for param in saved['params']]
    optimizer = Adan(params, lr=1)  # the state has its own options
    optimizer.load_state_dict(saved['optimizer'])
    take_steps(optimizer, params, range(5, 12))
    assert are_equal(params, whole)


def test_rates_in_tensors_and_changes_between_the_forms():
    """What a recording needs, and runs that go on with it or without."""
    whole, params = make_params(), make_params()
    first = Adan(whole, lr=1e-2, weight_decay=0.02)
    take_steps(first, whole, range(9))
    state = {}
    for steps, capturable in ((range(3), True), (range(3, 6), False), (range(6, 9), True)):
        optimizer = Adan(params, lr=1, weight_decay=0.02, capturable=capturable)
        if steps.start:
            state['param_groups'][0]['capturable'] = capturable
            optimizer.load_state_dict(state)
        rate = torch.tensor(1e-2, dtype=torch.float64) if capturable else 1e-2
        optimizer.param_groups[0]['lr'] = rate
        take_steps(optimizer, params, steps)
        optimizer.param_groups[0]['lr'] = 1e-2
        state = optimizer.state_dict()
        counters = {id(one['step']) for one in state['state'].values() if isinstance(one['step'], torch.Tensor)}
        assert len(counters) == int(capturable)
    for param, expected in zip(params, whole):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_run_resumes_bit_for_bit(tmp_path):
    """Six iterations of a BasicSR model equal four that are resumed; one whole image makes all batches the same."""
    write_pairs(tmp_path, count=1)
    options = yaml.safe_load(TINY_OPTIONS.format(root=tmp_path, suffix='', backend='disk').replace('1e-3', '0.001'))
    options['datasets']['train'].update(gt_size=32, use_hflip=False, use_rot=False)
    options['train']['optim_g'] = {'type': 'Adan', 'lr': 0.005, 'betas': list(BETAS), 'weight_decay': 0.02}
    (tmp_path / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    command = ['-m', 'lora_sr.train', '-opt', 'run.yml', '--force_yml']
    run_python(*command, 'name=whole', cwd=tmp_path)
    run_python(*command, 'name=parts', 'train:total_iter=4', cwd=tmp_path)
    rest = run_python(*command, 'name=parts', '--auto_resume', cwd=tmp_path)
    assert logged(rest) == {5: 2.5e-3, 6: 1.25e-3}

    def weights(name, iteration) -> dict:
        return read_checkpoint(tmp_path / 'experiments' / name / 'models' / f'net_g_{iteration}.pth')['params']

    whole, parts, before = weights('whole', 6), weights('parts', 6), weights('parts', 4)
    assert are_equal(list(parts.values()), list(whole.values()))
    assert not any(torch.equal(parts[key], before[key]) for key in parts)


@pytest.mark.parametrize(
    ('other', 'options'),
    [(torch.optim.Adam, 'lr, betas, eps, weight_decay'), (adan_pytorch.Adan, '.*weight_decay, restart_cond: go on')],
)
def test_state_of_another_optimizer_is_refused(other, options):
    params = make_params()
    optimizer = other(params, lr=1e-3)
    take_steps(optimizer, params, range(2))
    with pytest.raises(InputError, match=f'is not of Adan, but of an optimizer with the options {options}'):
        Adan(params).load_state_dict(optimizer.state_dict())


def test_state_of_another_optimizer_without_a_step_is_refused():
    params = make_params()
    with pytest.raises(InputError, match='is not of Adan'):
        Adan(params).load_state_dict(torch.optim.Adam(params).state_dict())


@pytest.mark.slow
def test_run_with_adan_is_not_resumed_with_adam(tiny_options):
    text = tiny_options.read_text().replace('type: AdamW, lr: 1e-3, betas: [0.9, 0.99]', 'type: Adan, lr: 1e-3')
    tiny_options.write_text(text)
    command = ['-m', 'lora_sr.train', '-opt', tiny_options.name]
    run_python(*command, '--force_yml', 'train:total_iter=2', cwd=tiny_options.parent)
    changes = ['--auto_resume', '--force_yml', 'train:optim_g:type=Adam']
    done = run_python(*command, *changes, cwd=tiny_options.parent, status=2)
    assert 'train.optim_g.type must be Adan to resume this run, got Adam; a new run may begin from ' in done.stderr
    assert 'Traceback' not in done.stderr


# --- options ---


def test_is_registered():
    assert find_optimizer('Adan') is Adan and issubclass(Adan, adan_pytorch.Adan)


@pytest.mark.parametrize(
    ('key', 'value', 'sentence'),
    [
        (
            'betas',
            [0.98, 0.92],
            r'"betas" of Adan must be three numbers of at least 0 and .* got \[0.98, 0.92\]',
        ),
        ('betas', (0.98, 0.92, 1), r'"betas" of Adan must be .* got \(0.98, 0.92, 1\)'),
        ('betas', (-0.1, 0.92, 0.99), '"betas" of Adan'),
        ('betas', (0.98, '0.92', 0.99), '"betas" of Adan'),
        ('betas', 0.98, '"betas" of Adan must be .* got 0.98'),
        ('lr', -1e-3, '"lr" of Adan must be a number of at least 0, got -0.001'),
        ('lr', '5e-3', '"lr" of Adan must be .* got \'5e-3\''),
        ('lr', torch.tensor(5e-3), '"lr" of Adan must be .* got tensor'),
        ('lr', float('nan'), '"lr" of Adan must be .* got nan'),
        ('eps', float('inf'), '"eps" of Adan must be .* got inf'),
        ('weight_decay', -0.02, '"weight_decay" of Adan must be .* got -0.02'),
        ('weight_decay', True, '"weight_decay" of Adan must be .* got True'),
        ('foreach', None, '"foreach" of Adan must be true or false, got None'),
    ],
)
def test_wrong_values(key, value, sentence):
    params = make_params()
    with pytest.raises(InputError, match=sentence):
        Adan(params, **{key: value})
    optimizer = Adan(params[:1])
    with pytest.raises(InputError, match=sentence):
        optimizer.add_param_group({'params': params[1:], key: value})
    assert len(optimizer.param_groups) == 1
