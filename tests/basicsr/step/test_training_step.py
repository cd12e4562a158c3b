"""Keys of `train:` that say how a step runs, in every model of BasicSR's and ours, against the models without them."""

import copy
import math

import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from tiny_steps import SWINIR, assert_near, built, steps, validated, weights
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import DivergenceError, InputError

MODELS = (
    *('SRModel', 'SwinIRModel', 'RealESRNetModel', 'SRGANModel', 'ESRGANModel', 'RealESRGANModel'),
    'DistillationModel',
)
# What each key is tried with, and how far the losses may then be from those without it, relative to these.
KEYS = {
    'amp: bf16': ({'amp': 'bf16'}, 3e-2),
    'amp: fp16': ({'amp': 'fp16'}, 1e-2),
    'memory_format': ({'memory_format': 'channels_last'}, 1e-4),
    'compile': ({'compile': {'backend': 'eager'}}, 0),
    'checkpointing': ({'checkpointing': True}, 0),
    'clip_grad_norm': ({'clip_grad_norm': 1e6}, 1e-6),
    'tf32': ({'tf32': False}, 0),
    'graph': ({'graph': True}, 0),
    'together': (
        {
            **{'amp': 'bf16', 'memory_format': 'channels_last', 'compile': {'backend': 'eager'}},
            **{'accumulate_iter': 2, 'clip_grad_norm': 1.0, 'checkpointing': True},
        },
        3e-2,
    ),
}


@pytest.mark.parametrize('key', KEYS)
@pytest.mark.parametrize('kind', MODELS)
def test_losses_are_those_without_the_key(options, kind, key):
    """A run with a key trains, validates, is saved, resumes to the last bit, and has the losses of one without."""
    train, tolerance = KEYS[key]
    plain = built(options(kind, accumulate_iter=1) if 'accumulate_iter' in train else options(kind))
    expected = steps(plain, 1, 6)
    model = built(options(kind, **train))
    if train.get('amp') == 'fp16':  # from where it stays; else the first steps are left out to find that
        model.training_step.scaler.load_state_dict({**model.training_step.scaler.state_dict(), 'scale': 256.0})
    if kind == 'ESRGANModel' and 'accumulate_iter' in train:
        tolerance = 0.1  # it compares with the mean of the batch
    losses = steps(model, 1, 3)
    image = validated(model)
    model.save(0, 3)
    losses += steps(model, 4, 6)
    assert_near(losses, expected, tolerance)
    if tolerance == 0:
        assert all(torch.equal(*pair) for pair in zip(weights(model).values(), weights(plain).values()))

    # Resumed, it is the run that went on.
    opt = options(kind, **train)
    opt['path'].update({f'pretrain_network_{x}': f'{opt["path"]["models"]}/net_{x}_3.pth' for x in 'gd'})
    opt['path']['resume_state'] = f'{opt["path"]["training_states"]}/3.state'
    resumed = built(opt, seed=1)
    resumed.resume_training(dict(read_checkpoint(opt['path']['resume_state'])))
    assert torch.equal(validated(resumed), image)
    assert steps(resumed, 4, 6) == losses[3:]
    for name, value in weights(model).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert weights(model).keys() == weights(plain).keys()  # no `_orig_mod.`


@pytest.mark.parametrize('kind', [kind for kind in MODELS if kind != 'ESRGANModel'])
def test_parts_of_a_batch_are_the_batch(options, kind):
    """The gradients of four parts are those of the whole, in an optimizer that shows their size, and so is the log."""
    sgd = {'type': 'SGD', 'lr': 1e-1, 'momentum': 0.9}
    # Of L1 a pixel that is right but for rounding has the gradient 1 or -1.
    train = {'optim_g': sgd, **({'optim_d': sgd} if 'GAN' in kind else {}), 'pixel_opt': {'type': 'MSELoss'}}
    section = {**SWINIR, 'drop_path_rate': 0}
    whole, parts = options(kind, **train), options(kind, **train, accumulate_iter=4)
    for opt in (whole, parts):
        opt['network_g'] = section if kind == 'SwinIRModel' else opt['network_g']
    whole, parts = built(whole), built(parts)
    assert_near(steps(parts, 1, 5), steps(whole, 1, 5), 1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)
    assert len(parts.lq) == 4  # the model has its batch back


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_is_torch_s(options, dtype):
    """Beside a loop as torch's documentation writes it: to the last bit."""
    model = built(options('SRModel', ema_decay=0, amp={torch.bfloat16: 'bf16', torch.float16: 'fp16'}[dtype]))
    network = copy.deepcopy(model.net_g)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', enabled=dtype is torch.float16)
    for iteration in range(1, 4):
        steps(model, iteration, iteration)
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype):
            output = network(model.lq)
        scaler.scale(F.l1_loss(output.float(), model.gt)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(*pair) for pair in zip(model.net_g.parameters(), network.parameters()))


def test_clipping_is_torch_s(options):
    model = built(options('SRModel', ema_decay=0, clip_grad_norm=1e-3, optim_g={'type': 'SGD', 'lr': 1.0}))
    network = copy.deepcopy(model.net_g)
    steps(model, 1, 1)
    F.l1_loss(network(model.lq), model.gt).backward()
    assert nn.utils.clip_grad_norm_(network.parameters(), 1e-3) > 5e-3
    for ours, theirs in zip(model.net_g.parameters(), network.parameters()):
        torch.testing.assert_close(ours, theirs - theirs.grad)


def test_a_step_that_overflows_is_left_out(options):
    """And the scale that it leads to is found again when the run goes on."""
    opt = options('SRModel', ema_decay=0, amp='fp16')
    model = built(opt)
    before = copy.deepcopy(weights(model))
    scaler = model.training_step.scaler
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 2.0**40})
    steps(model, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert scaler.get_scale() == 2.0**39
    model.save(0, 1)
    opt['path']['pretrain_network_g'] = f'{opt["path"]["models"]}/net_g_1.pth'
    resumed = built(opt)
    resumed.resume_training(dict(read_checkpoint(f'{opt["path"]["training_states"]}/1.state')))
    assert resumed.training_step.scaler.get_scale() == 2.0**39


def test_a_validation_is_in_float32(options):
    """Neither autocast nor what was compiled for the patches of the training reaches it."""
    counter = CompileCounter()
    model = built(
        options(
            'SRModel', amp='bf16', compile={'backend': lambda *graph: counter(*graph)}, memory_format='channels_last'
        )
    )
    steps(model, 1, 1)
    compiled = counter.frame_count
    assert torch.equal(validated(model), copy.deepcopy(model.net_g_ema)(model.lq))
    assert model.output.dtype == torch.float32 and counter.frame_count == compiled > 0


@pytest.mark.parametrize('adapted', [False, True])
def test_blocks_are_compiled_once(options, adapted):
    """Not once for each block, nor again when the weights have changed."""
    counter = CompileCounter()
    opt = options('SRModel', compile={'backend': lambda *graph: counter(*graph)})
    if adapted:
        opt['network_g'] = {'type': 'AdaptSR', 'base': opt['network_g'], 'lora': {'groups': ['all'], 'rank': 2}}
    model = built(opt)
    steps(model, 1, 3)
    assert counter.frame_count == 1


def test_checkpointing_keeps_no_activations_of_blocks(options):
    """Beside the same network without, in the bytes that are kept for the backward pass."""

    def kept(model) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            steps(model, 1, 1)
        return sum(sizes)

    assert kept(built(options('SRModel', checkpointing=True))) < 0.8 * kept(built(options('SRModel')))


# --- models of others ---


class TwoTerms(SRModel):
    """Differentiates twice, once of a feature that a hook has taken, and has no average."""

    def optimize_parameters(self, current_iter):
        taken = []
        handle = self.net_g.body.register_forward_hook(lambda module, inputs, output: taken.append(output))
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq)
        handle.remove()
        pixel, feature = F.mse_loss(self.output, self.gt), taken[0].float().square().mean()
        pixel.backward(retain_graph=True)
        feature.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict({'pixel': pixel, 'feature': feature})


class TwoSteps(SRModel):
    def optimize_parameters(self, current_iter):
        super().optimize_parameters(current_iter)
        super().optimize_parameters(current_iter)


class OddBatch(SRModel):
    def feed_data(self, data):
        self.images = {'lq': data['lq'], 'gt': data['gt']}

    def optimize_parameters(self, current_iter):
        raise AssertionError


class ClearsAfterwards(SRModel):
    """As some of torch's examples do."""

    def optimize_parameters(self, current_iter):
        self.output = self.net_g(self.lq)
        loss = self.cri_pix(self.output, self.gt)
        loss.backward()
        self.optimizer_g.step()
        self.optimizer_g.zero_grad()
        self.log_dict = self.reduce_loss_dict({'l_pix': loss})


class ClearsTheNetwork(ClearsAfterwards):
    def optimize_parameters(self, current_iter):
        self.net_g.zero_grad()
        self.output = self.net_g(self.lq)
        loss = self.cri_pix(self.output, self.gt)
        loss.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict({'l_pix': loss})


OF_OTHERS = (TwoTerms, TwoSteps, OddBatch, ClearsAfterwards, ClearsTheNetwork)


@pytest.fixture
def of_others():
    for model in OF_OTHERS:
        MODEL_REGISTRY.register(model)
    yield
    for model in OF_OTHERS:
        del MODEL_REGISTRY._obj_map[model.__name__]


@pytest.mark.parametrize(
    ('kind', 'train', 'tolerance'),
    [
        ('TwoTerms', {'accumulate_iter': 2}, 1e-5),
        ('TwoTerms', {'amp': 'fp16'}, 3e-3),
        ('TwoTerms', {'amp': 'bf16', 'accumulate_iter': 2}, 3e-2),
        ('ClearsAfterwards', {'accumulate_iter': 4}, 1e-5),
        ('ClearsTheNetwork', {'amp': 'fp16'}, 3e-3),
    ],
)
def test_a_model_of_somebody_else_s(options, of_others, kind, train, tolerance):
    sgd = {'type': 'SGD', 'lr': 1e-1}
    own, plain = built(options(kind, optim_g=sgd, **train)), built(options(kind, optim_g=sgd))
    assert_near(steps(own, 1, 4), steps(plain, 1, 4), tolerance)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(own)[name], value, rtol=10 * tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(
    ('kind', 'reason'),
    [
        ('TwoSteps', 'which steps more than once in an iteration'),
        ('OddBatch', 'which does not keep its batch in tensors'),
        ('ClearsTheNetwork', "which clears its gradients by other means than its optimizer's zero_grad"),
    ],
)
def test_models_without_parts(options, of_others, kind, reason):
    with pytest.raises(InputError) as error:
        steps(built(options(kind, accumulate_iter=2)), 1, 1)
    assert str(error.value) == f'train.accumulate_iter must be 1 for {kind}, {reason}, got 2.'


# --- what a model cannot have ---


def test_a_network_without_blocks(options):
    opt = options('SRModel', checkpointing=True)
    opt['network_g'] = {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_conv': 2, 'upscale': 2}
    with pytest.raises(InputError, match='^train.checkpointing must be false for network_g: SRVGGNetCompact is not'):
        built(opt)


@pytest.mark.parametrize(
    ('train', 'reason'),
    [
        ({'amp': 'fp8'}, "train.amp: there is no 'fp8'; it is one of bf16, fp16, ~"),
        ({'clip_grad_norm': 0}, 'train.clip_grad_norm has to be a number more than 0 or ~, not 0'),
        ({'accumulate_iter': 0}, 'train.accumulate_iter has to be a whole number of at least 1, not 0'),
        ({'compile': 3}, 'train.compile has to be true, false, or a section of arguments of torch.compile, not 3'),
    ],
)
def test_wrong_values(options, train, reason):
    with pytest.raises(InputError) as error:
        built(options('SRModel', **train))
    assert str(error.value) == reason


# --- losses and the average ---


def test_losses_of_a_gpu_are_read_when_they_are_logged(options):
    model = built(options('SRModel'))
    model.device = torch.device('cuda')
    model.log_dict = model.reduce_loss_dict({'l_pix': torch.tensor([1.0, 2.0]), 'l_other': torch.tensor(0.5)})
    assert all(isinstance(value, torch.Tensor) for value in model.log_dict.values())
    assert model.get_current_log() == {'l_pix': 1.5, 'l_other': 0.5}
    model.log_dict = model.reduce_loss_dict({'l_pix': torch.tensor(math.nan)})
    with pytest.raises(DivergenceError, match='the loss l_pix is nan'):
        model.get_current_log()


def test_average_follows_its_formula(options):
    model = built(options('SRModel'))
    expected = {name: value.double() for name, value in model.net_g.named_parameters()}
    for iteration in range(1, 6):
        steps(model, iteration, iteration)
        for name, value in model.net_g.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach().double()
    for name, value in model.net_g_ema.named_parameters():
        torch.testing.assert_close(value.double(), expected[name].detach(), rtol=1e-6, atol=1e-8)


def test_a_teacher_is_in_float32_until_the_first_step(options):
    """Its outputs for whole images may be made before; in a step its layers need no more cast."""
    plain, model = built(options('DistillationModel')), built(options('DistillationModel', amp='bf16'))
    image = torch.rand(1, 3, 12, 8)
    assert torch.equal(model.net_t(image), plain.net_t(image))
    steps(model, 1, 1)
    assert {value.dtype for value in model.net_t.parameters()} == {torch.bfloat16}
