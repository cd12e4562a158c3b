"""Distillation: its losses against the formulas, its average, its teacher, resuming, and what it refuses."""

import copy
import logging

import pytest
import torch
from basicsr.archs import build_network
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from lora_sr.adapters import is_lora_key
from lora_sr.archs import is_training_form
from lora_sr.archs.span import SPAN
from lora_sr.errors import InputError


@pytest.fixture
def checkpoints(tmp_path):
    torch.manual_seed(0)
    torch.save({'params': SPAN(feature_channels=6, upscale=2, deploy=True).state_dict()}, tmp_path / 'student.pth')
    torch.save({'params': {}, 'params_ema': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    return tmp_path


@pytest.fixture
def options(checkpoints):
    (checkpoints / 'models').mkdir()
    (checkpoints / 'training_states').mkdir()
    return {
        'model_type': 'DistillationModel',
        'name': 'test',
        'scale': 2,
        'num_gpu': 0,
        'dist': False,
        'is_train': True,
        'rank': 0,
        'world_size': 1,
        'manual_seed': 0,
        'datasets': {'train': {'gt_size': 24}},
        'network_g': {'type': 'DSCLoRA', 'feature_channels': 6, 'upscale': 2, 'rank': 2, 'alpha': 4},
        'network_t': {'type': 'SPAN', 'feature_channels': 8, 'upscale': 2},
        'path': {
            'pretrain_network_g': str(checkpoints / 'student.pth'),
            'pretrain_network_t': str(checkpoints / 'teacher.pth'),
            'models': str(checkpoints / 'models'),
            'training_states': str(checkpoints / 'training_states'),
        },
        'train': {
            'ema_decay': 0.9,
            'total_iter': 10,
            'optim_g': {'type': 'Adam', 'lr': 1e-3},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [3]},
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 0.5},
            'distill_pixel_opt': {'type': 'MSELoss', 'loss_weight': 2.0},
            'affinity_opt': {
                'type': 'SpatialAffinityLoss',
                'loss_weight': 3.0,
                'layers': ['block_1', 'block_6', 'conv_2'],
            },
        },
    }


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {'lq': torch.rand(2, 3, 12, 12, generator=generator), 'gt': torch.rand(2, 3, 24, 24, generator=generator)}


def step(model, iteration, seed=None):
    model.update_learning_rate(iteration)
    model.feed_data(batch(iteration if seed is None else seed))
    model.optimize_parameters(iteration)
    return dict(model.log_dict)


def features(network, x, layers):
    """Outputs of the named modules, by walking the network's definition rather than by hooks."""
    found = {}
    with torch.no_grad():
        shallow = network.conv_1((x - network.mean) * 255)
        out = shallow
        for i in range(1, 7):
            out, _ = getattr(network, f'block_{i}')(out)
            found[f'block_{i}'] = out
        found['conv_2'] = network.conv_2(out)
    return [found[layer] for layer in layers]


def test_logged_losses_follow_the_formulas(options):
    model = build_model(options)
    student, teacher = copy.deepcopy(model.net_g), copy.deepcopy(model.net_t)
    data = batch(1)
    with torch.no_grad():
        output, taught = student(data['lq']), teacher(data['lq'])
    distances = []
    layers = ['block_1', 'block_6', 'conv_2']
    for s, t in zip(features(student, data['lq'], layers), features(teacher, data['lq'], layers)):
        s, t = (F.normalize(f.flatten(2), dim=1) for f in (s, t))
        distances.append((s.transpose(1, 2) @ s - t.transpose(1, 2) @ t).abs().mean())
    expected = {
        'l_pix': 0.5 * (output - data['gt']).abs().mean(),
        'l_distill': 2 * (output - taught).square().mean(),
        'l_affinity': 3 * sum(distances) / 3,
    }
    logged = step(model, 1)
    assert list(logged) == list(expected)
    for key, value in expected.items():
        assert logged[key] == pytest.approx(value.item(), rel=1e-5), key


def test_only_lora_moves_and_the_teacher_stays(options):
    model = build_model(options)
    assert not is_training_form(model.net_t) and not model.net_t.training
    assert not any(parameter.requires_grad for parameter in model.net_t.parameters())
    before, teacher = copy.deepcopy(model.net_g.state_dict()), copy.deepcopy(model.net_t.state_dict())
    first = sum(step(model, 1, seed=1).values())
    for iteration in range(2, 9):
        last = sum(step(model, iteration, seed=1).values())
    moved = {key for key, value in model.net_g.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.endswith(('lora_A', 'lora_B'))}
    assert all(torch.equal(value, teacher[key]) for key, value in model.net_t.state_dict().items())
    assert last < first


def test_average_starts_as_an_exact_copy_and_follows_the_decay(options):
    model = build_model(options)
    start = copy.deepcopy(model.net_g.state_dict())
    assert all(torch.equal(value, start[key]) for key, value in model.net_g_ema.state_dict().items())
    step(model, 1)
    for key, value in model.net_g_ema.state_dict().items():
        torch.testing.assert_close(value, 0.9 * start[key] + 0.1 * model.net_g.state_dict()[key])


def test_resumed_run_goes_on_as_if_it_had_not_stopped(options):
    model = build_model(options)
    for iteration in range(1, 5):
        step(model, iteration)
    model.save(0, 4)
    expected = [step(model, iteration) for iteration in (5, 6)]

    resumed = copy.deepcopy(options)
    resumed['path'].update(resume_state='yes', pretrain_network_g=f'{options["path"]["models"]}/net_g_4.pth')
    other = build_model(resumed)
    other.resume_training(torch.load(f'{options["path"]["training_states"]}/4.state', weights_only=True))
    assert [step(other, iteration) for iteration in (5, 6)] == expected
    assert other.get_current_learning_rate() == model.get_current_learning_rate() == [1e-4]
    for ours, theirs in ((other.net_g, model.net_g), (other.net_g_ema, model.net_g_ema)):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_channels_last_gives_the_same_losses(options):
    expected = step(build_model(options), 1)
    options['train']['memory_format'] = 'channels_last'
    torch.manual_seed(0)
    model = build_model(options)
    assert model.net_t.conv_2.eval_conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert step(model, 1) == pytest.approx(expected, rel=1e-4)


class Volumes(nn.Module):
    """A teacher with a parameter of five dimensions, as FFTformer's are."""

    def __init__(self, upscale):
        super().__init__()
        self.volume = nn.Parameter(torch.ones(1, 3, 1, 1, 1))
        self.upscale = upscale

    def forward(self, x):
        return F.interpolate(x * self.volume[:, :, 0], scale_factor=self.upscale)


def test_channels_last_leaves_five_dimensions_alone(options, checkpoints, monkeypatch):
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Volumes', Volumes)
    options['network_t'] = {'type': 'Volumes', 'upscale': 2}
    options['train']['memory_format'] = 'channels_last'
    del options['train']['affinity_opt']
    torch.save(Volumes(2).state_dict(), checkpoints / 'teacher.pth')
    assert step(build_model(options), 1)['l_distill'] > 0


def test_networks_of_different_families(options, checkpoints):
    options['network_t'] = {'type': 'MSRResNet', 'num_feat': 4, 'num_block': 2, 'upscale': 2}
    torch.save(build_network(options['network_t']).state_dict(), checkpoints / 'teacher.pth')
    options['train']['affinity_opt']['layers'] = {'student': ['block_6', 'conv_1'], 'teacher': ['body', 'conv_first']}
    del options['train']['pixel_opt']
    assert set(step(build_model(options), 1)) == {'l_distill', 'l_affinity'}


def test_testing_needs_no_teacher(options):
    options['is_train'] = False
    options.pop('network_t')
    options.pop('train')
    model = build_model(options)
    model.feed_data(batch())
    model.test()
    assert model.output.shape == (2, 3, 24, 24) and not hasattr(model, 'net_t')


def set_key(path, value):
    def change(options):
        *parents, last = path
        for parent in parents:
            options = options[parent]
        if value is None:
            options.pop(last, None)
        else:
            options[last] = value

    return change


@pytest.mark.parametrize(
    'change, message',
    [
        (set_key(['network_t'], None), 'network_t, the teacher of a DistillationModel, is missing'),
        (set_key(['path', 'pretrain_network_t'], None), 'pretrain_network_t, the trained weights of the teacher, is'),
        (set_key(['path', 'pretrain_network_t'], 'absent.pth'), 'checkpoint absent.pth cannot be read'),
        (set_key(['network_t', 'feature_channels'], 10), 'teacher.pth does not fit SPAN'),
        (set_key(['scale'], 3), r'"scale" is 3, but network_g \(DSCLoRA\) makes 16x16 of 8x8'),
        (
            set_key(['train', 'memory_format'], 'channels_lats'),
            "train.memory_format: there is no 'channels_lats'; it is one of contig",
        ),
        (
            set_key(['train', 'affinity_opt', 'layers'], ['block_7']),
            "'block_7' in the student, DSCLoRA; .*block_",
        ),
        (
            set_key(['train', 'affinity_opt', 'layers'], {'student': ['conv_1'], 'teacher': ['up']}),
            "no module 'up' in the teacher, SPAN",
        ),
        (
            set_key(['train', 'affinity_opt', 'layers'], {'student': ['conv_1'], 'teacher': ['conv_1', 'conv_2']}),
            '1 layers of the student, but 2',
        ),
        (set_key(['train', 'affinity_opt', 'layers'], {'student': ['upsampler'], 'teacher': ['conv_1']}), 'equal N, H'),
        (set_key(['train', 'affinity_opt', 'layers'], None), 'has to be a list of module names'),
    ],
)
def test_what_it_refuses(options, change, message):
    change(options)
    with pytest.raises(InputError, match=message):
        build_model(options)


def test_networks_of_different_channels_are_refused(options):
    options['network_g'] = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 1, 'scale': 2, 'num_feat': 4,
                            'num_block': 1, 'num_grow_ch': 4}  # fmt: skip
    options['path']['pretrain_network_g'] = None
    del options['train']['affinity_opt']
    with pytest.raises(InputError, match='network_g gives 1 channels, but network_t 3'):
        build_model(options)


def test_no_loss_from_the_teacher_is_refused(options):
    del options['train']['distill_pixel_opt'], options['train']['affinity_opt']
    with pytest.raises(InputError, match='are both missing; without one of them nothing is learned from the teacher'):
        build_model(options)


@pytest.mark.parametrize('model_type', ['DistillationModel', 'SRModel'])
def test_frozen_tensors_and_forgiven_keys_are_not_a_screenful_of_warnings(options, model_type):
    options['model_type'] = model_type
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger('basicsr').addHandler(handler)
    try:
        build_model(options)
    finally:
        logging.getLogger('basicsr').removeHandler(handler)
    assert [record.getMessage() for record in records] == ['44 of 84 parameter tensors are frozen.']


@torch.no_grad()
@pytest.mark.parametrize('with_lora', [False, True])
def test_student_in_windows_is_validated_at_any_size(options, with_lora):
    """Against the network itself on the padded image, cropped: as BasicSR's SwinIRModel tests."""
    network = {'type': 'SwinIR', 'embed_dim': 8, 'depths': [1], 'num_heads': [2], 'window_size': 4,
               'mlp_ratio': 2, 'upscale': 2, 'upsampler': 'pixelshuffledirect'}  # fmt: skip
    lora = {'type': 'AdaptSR', 'base': network, 'lora': {'groups': ['attention'], 'rank': 2}}
    options['network_g'] = lora if with_lora else network
    options['path']['pretrain_network_g'] = None
    del options['train']['affinity_opt']
    model = build_model(options)
    x = torch.rand(1, 3, 10, 13)
    model.feed_data({'lq': x})
    model.test()
    padded = F.pad(x, (0, 3, 0, 2), 'reflect')
    assert torch.equal(model.output, model.net_g_ema(padded)[:, :, :20, :26]) and model.lq.shape == x.shape


def test_average_carries_no_hooks_and_features_are_let_go(options):
    model = build_model(options)
    step(model, 1)
    assert not any(module._forward_hooks for module in model.net_g_ema.modules())
    assert model.student_tap.take() == model.teacher_tap.take() == [None] * 3


@pytest.mark.parametrize('model_type', ['DistillationModel', 'SRModel'])
def test_average_of_any_lora_network_starts_as_an_exact_copy(options, model_type):
    options['model_type'] = model_type
    model = build_model(options)
    own = model.net_g.state_dict()
    assert any(map(is_lora_key, own))
    assert all(torch.equal(value, own[key]) for key, value in model.net_g_ema.state_dict().items())


def test_average_keeps_what_its_file_gives_and_copies_the_rest(options, tmp_path):
    """A file of another scale, with weights and an average of its own: only the upsampler is the network's."""
    torch.manual_seed(1)
    file = {key: SPAN(feature_channels=6, upscale=4, deploy=True).state_dict() for key in ('params', 'params_ema')}
    torch.save(file, tmp_path / 'x4.pth')
    options['model_type'] = 'SRModel'
    options['network_g'] = {'type': 'SPAN', 'feature_channels': 6, 'upscale': 2, 'deploy': True}
    options['path'].update(pretrain_network_g=str(tmp_path / 'x4.pth'), strict_load_g=False)
    model = build_model(options)
    own = model.net_g.state_dict()
    for key, value in model.net_g_ema.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith('upsampler') else file['params_ema'][key])


@pytest.mark.parametrize('strict', [True, False])
def test_average_of_a_stock_model_starts_from_a_file_of_plain_weights(options, strict):
    options['model_type'] = 'SRModel'
    weights = SPAN(feature_channels=6, upscale=2, deploy=True).state_dict()
    torch.save(weights, options['path']['pretrain_network_g'])
    options['path'].update(param_key_g=None, strict_load_g=strict)
    model = build_model(options)
    assert all(torch.equal(model.net_g_ema.state_dict()[key], value) for key, value in weights.items())
