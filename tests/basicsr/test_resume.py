"""Going on with a run: bit for bit where nothing has changed, by the option file where something has."""

import copy
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models import build_model
from tiny_run import TINY_OPTIONS, change, logged, model_options, run_python, write_pairs

from lora_sr.basicsr import provenance, resume
from lora_sr.basicsr.patches.resume import load_resume_state
from lora_sr.basicsr.samples import SampleStream
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.data import prepare_databases
from lora_sr.errors import DivergenceError, InputError

STEPS = {'type': 'MultiStepLR', 'milestones': [4, 8], 'gamma': 0.5}
COSINE = {'type': 'CosineAnnealingRestartLR', 'periods': [10], 'restart_weights': [1], 'eta_min': 1e-7}


@pytest.fixture
def options(tmp_path):
    opt = model_options(tmp_path)
    opt['train']['scheduler'] = dict(STEPS)
    return opt


def rates(model, first, last, warmup=-1):
    """The learning rates of iterations, each with a step."""
    told = []
    for iteration in range(first, last + 1):
        model.update_learning_rate(iteration, warmup)
        model.feed_data({'lq': torch.rand(1, 3, 6, 6), 'gt': torch.rand(1, 3, 12, 12)})
        model.optimize_parameters(iteration)
        told.append(model.get_current_learning_rate()[0])
    return told


def go_on(options, changes, at=6):
    """A model that has been resumed at an iteration, with changed options."""
    model = build_model(copy.deepcopy(options))
    rates(model, 1, at)
    model.save(0, at)
    changed = copy.deepcopy(options)
    for path, value in changes.items():
        change(changed, path, value)
    other = build_model(copy.deepcopy(changed))
    other.resume_training(dict(read_checkpoint(f'{options["path"]["training_states"]}/{at}.state')))
    return other, changed


@pytest.mark.parametrize(
    ('scheduler', 'changes', 'sentences'),
    [
        (STEPS, {}, []),
        (COSINE, {}, []),
        (STEPS, {'train.optim_g.lr': 1e-5}, ['lr of the option file was 0.001 and is 1e-05 now']),
        (STEPS, {'train.scheduler.milestones': [5, 9]}, ['milestones of the option file was [4, 8] and is [5, 9] now']),
        (STEPS, {'train.scheduler.gamma': 0.1}, ['gamma of the option file was 0.5 and is 0.1 now']),
        (COSINE, {'train.scheduler.periods': [20]}, ['periods of the option file was [10] and is [20] now']),
        (STEPS, {'train.scheduler': dict(COSINE)}, ['scheduler of the option file was milestones, gamma, ']),
        (COSINE, {'train.scheduler': dict(STEPS)}, ['scheduler of the option file was periods, ']),
        (COSINE, {'train.optim_g.lr': 1e-2, 'train.scheduler.eta_min': 1e-4}, ['lr', 'eta_min']),
    ],
)
def test_learning_rates_are_those_of_the_option_file(options, basicsr_log, scheduler, changes, sentences):
    """What remains of the run has the rates of a run with these options from its beginning, to the last bit."""
    options['train']['scheduler'] = dict(scheduler)
    resumed, changed = go_on(options, changes)
    whole = build_model(copy.deepcopy(changed))
    assert rates(resumed, 7, 10) == rates(whole, 1, 10)[6:]
    told = {record.getMessage() for record in basicsr_log.records if 'of the option file was' in record.getMessage()}
    assert len(told) == len(sentences)
    assert all(any(line.startswith(sentence) for line in told) for sentence in sentences)


@pytest.mark.parametrize('scheduler', [STEPS, COSINE])
def test_after_a_warm_up_the_rates_are_the_scheduler_s(options, scheduler):
    options['train']['scheduler'] = dict(scheduler)
    expected = rates(build_model(copy.deepcopy(options)), 1, 10)
    warm = rates(build_model(copy.deepcopy(options)), 1, 10, warmup=6)
    assert warm == [*(1e-3 / 6 * iteration for iteration in range(1, 6)), *expected[5:]]


def test_settings_of_the_optimizer_are_those_of_the_option_file(options):
    resumed, _ = go_on(options, {'train.optim_g.betas': [0.5, 0.9], 'train.optim_g.weight_decay': 0.1})
    (group,) = resumed.optimizer_g.param_groups
    assert list(group['betas']) == [0.5, 0.9] and group['weight_decay'] == 0.1
    assert resumed.optimizer_g.state[group['params'][0]]['step'] == 6  # its moments go on


def test_what_an_optimizer_counts_in_its_groups_goes_on(options):
    """Some optimizers keep their estimates there, which no option file has."""
    model = build_model(copy.deepcopy(options))
    model.optimizer_g.param_groups[0]['estimate'] = 1.0
    rates(model, 1, 2)
    model.optimizer_g.param_groups[0]['estimate'] = 3.0
    model.save(0, 2)
    other = build_model(copy.deepcopy(options))
    other.optimizer_g.param_groups[0]['estimate'] = 1.0
    other.resume_training(dict(read_checkpoint(f'{options["path"]["training_states"]}/2.state')))
    assert other.optimizer_g.param_groups[0]['estimate'] == 3.0


@pytest.mark.parametrize('how', ['another tensor', 'fewer tensors'])
def test_other_tensors_to_train(options, how):
    model = build_model(copy.deepcopy(options))
    rates(model, 1, 2)
    model.save(0, 2)
    state = dict(read_checkpoint(f'{options["path"]["training_states"]}/2.state'))
    if how == 'another tensor':
        state['lora_sr']['trained']['0'][3] = 'net_g.other'
    else:  # of BasicSR itself, which knows no names
        del state['lora_sr']
        state['optimizers'][0]['param_groups'][0]['params'].pop()
    with pytest.raises(InputError, match=r'it trained \d+ tensors, and \d+ train now.*; put that back, or begin'):
        build_model(copy.deepcopy(options)).resume_training(state)


@pytest.mark.parametrize(
    'own',
    [
        None, 'x', 3, ['samples'], {'trained': 1, 'best': 'x', 'samples': [], 'optimizer_types': 2},
        {'trained': {'0': 3}, 'samples': {'seed': 'x', 'seen': 'a'}, 'optimizer_types': {'optim_g': [1]}},
        {'best': {'val': 3}, 'network': {}}, {'best': {'val': {'psnr': 3}}, 'network': {'type': ['x']}},
        {'best': {'val': {'psnr': {'better': 'higher', 'val': 'x', 'iter': 1}}}, 'samples': {'seed': 5}},
    ],
)  # fmt: skip
def test_what_a_state_says_may_be_anything(options, own):
    model = build_model(copy.deepcopy(options))
    rates(model, 1, 2)
    model.save(0, 2)
    state = dict(read_checkpoint(f'{options["path"]["training_states"]}/2.state'))
    state['lora_sr'] = own
    resume.check_options(options, state)
    stream = SampleStream(EnlargedSampler(range(8), 1, 0, 1), 5)
    stream.begin({**options, 'train': {'total_iter': 9}}, 2, state, None)
    assert stream.seed == 5 and stream.start.seen == 4
    other = build_model(copy.deepcopy(options))
    other.resume_training(state)
    other._initialize_best_metric_results('val')
    other._update_best_metric_result('val', 'psnr', 29.0, 8)
    other.save(0, 4)
    assert other.best_metric_results['val']['psnr']['val'] == 29.0


def test_another_number_of_optimizers(options):
    model = build_model(copy.deepcopy(options))
    model.save(0, 2)
    state = dict(read_checkpoint(f'{options["path"]["training_states"]}/2.state'))
    for optimizers in ([], state['optimizers'] * 2):
        with pytest.raises(InputError, match=f'SRModel has 1 optimizers, and its training state {len(optimizers)}'):
            build_model(copy.deepcopy(options)).resume_training({**state, 'optimizers': optimizers})


class Pooled:
    """What of a model of Real-ESRGAN's a pool belongs to."""

    queue_size, device, opt = 4, torch.device('cpu'), {'dist': False, 'gt_size': 8, 'scale': 2}


@pytest.mark.parametrize(
    'change',
    [{}, {'dist': True}, {'gt_size': 16}, {'scale': 4}, {'queue_size': 6}, {'filled': 5}, {'filled': 'x'}, {'lr': 3}],
)
def test_a_pool_of_other_options_is_not_taken(change):
    lr, gt = (torch.randint(256, (4, 3, side, side)) / 255 for side in (4, 8))
    model = Pooled()
    model.queue_lr, model.queue_gt, model.queue_ptr = lr, gt, 4
    pool = {**resume._pool(model), **{key: change[key] for key in ('filled', 'lr') if key in change}}
    other = Pooled()
    other.opt = {**other.opt, **{key: change[key] for key in ('dist', 'gt_size', 'scale') if key in change}}
    other.queue_size = change.get('queue_size', 4)
    assert resume._take_pool(other, pool) == (not change)
    if not change:
        assert torch.equal(other.queue_lr, lr) and torch.equal(other.queue_gt, gt) and other.queue_ptr == 4


def test_an_image_of_other_levels_is_kept_as_it_is():
    half = torch.full((1, 3, 1, 1), 0.3)
    assert torch.equal(resume._unpacked(resume._packed(half)), half)


SPOILED = {
    "state['epoch'] = 'x'": 'its epoch must be a whole number',
    "state['iter'] = -1": 'its iter must be a whole number',
    "state['iter'] = True": 'its iter must be a whole number',
    "state['optimizers'] = None": 'its optimizers must be a list',
    "state['optimizers'] = [{}]": 'its optimizers[0].state must be a section, got None',
    "state['optimizers'][0]['state'] = []": 'its optimizers[0].state must be a section',
    "state['optimizers'][0]['param_groups'] = {}": 'its optimizers[0].param_groups must be a list',
    "state['optimizers'][0]['param_groups'] = [3]": 'its optimizers[0].param_groups must be a list of sections',
    "state['optimizers'][0]['param_groups'][0]['params'] = 3": 'its optimizers[0].param_groups.params must be a list',
    "state['optimizers'][0]['state'][0]['exp_avg'] = torch.zeros(1, 1, 1, 1)": 'exp_avg of an optimizer does not fit',
    "state['optimizers'][0]['state'][0]['exp_avg'][0] = torch.inf": 'exp_avg of an optimizer does not fit',
    "state['schedulers'] = []": 'MultiStepLR',
    "state['schedulers'] = [3]": 'its schedulers[0] must be a section',
    "state['schedulers'][0]['last_epoch'] = 'a'": "last_epoch of a scheduler must be a number, got 'a'",
    "state['schedulers'][0]['gamma'] = None": 'gamma of a scheduler must be a number, got None',
}


@pytest.mark.parametrize('change', SPOILED)
def test_a_spoiled_state_is_told(options, monkeypatch, change):
    monkeypatch.setattr(provenance, '_effective', {})  # of a run before, in this process
    model = build_model(copy.deepcopy(options))
    rates(model, 1, 2)
    model.save(0, 2)
    path = f'{options["path"]["training_states"]}/2.state'
    state = dict(read_checkpoint(path))
    exec(change, {'state': state, 'torch': torch})
    torch.save(state, path)
    message = SPOILED[change].replace('MultiStepLR', 'SRModel has 1 schedulers, and its training state 0')
    with pytest.raises(InputError) as refused:
        opt = copy.deepcopy(options)
        opt.update(auto_resume=False, path={**opt['path'], 'resume_state': path})
        build_model(copy.deepcopy(options)).resume_training(load_resume_state(opt))
    assert message in str(refused.value)


def test_an_iteration_draws_its_own_numbers(options):
    """Whatever was drawn before it, and in no other iteration and no other process."""
    model = build_model(copy.deepcopy(options))
    stream = SampleStream(EnlargedSampler(range(8), 2, 0, 1), 5)
    stream.begin(options, 2, {}, None)

    def draw(iteration, rank=0):
        stream.rank = rank
        model.update_learning_rate(iteration, -1)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw(1)
    others = [draw(2), draw(1, rank=1)]
    assert draw(1) == first and len({*others, first}) == 3


@pytest.mark.parametrize(
    ('path', 'value', 'is_known'),
    [
        ('val.metrics.psnr.crop_border', 2, True),  # as it was
        ('train.optim_g.lr', 1e-5, True),
        ('val.metrics.psnr.crop_border', 4, False),
        ('val.metrics.psnr', {'type': 'calculate_ssim', 'crop_border': 2}, False),
        ('datasets.val.dataroot_gt', '/another/disk/gt/', True),
        ('datasets.val.dataroot_gt', 'other', False),
    ],
)
def test_the_best_is_of_the_same_metric_on_the_same_images(options, basicsr_log, path, value, is_known):
    options['datasets'] = {'val': {'name': 'val', 'dataroot_gt': 'gt'}}
    model = build_model(copy.deepcopy(options))
    model._initialize_best_metric_results('val')
    model._update_best_metric_result('val', 'psnr', 30.0, 2)
    model.save(0, 4)
    change(options, path, value)
    other = build_model(copy.deepcopy(options))
    other.resume_training(dict(read_checkpoint(f'{options["path"]["training_states"]}/4.state')))
    other._initialize_best_metric_results('val')
    assert (other.best_metric_results['val']['psnr']['iter'] == 2) == is_known
    assert ('The best psnr on val begins anew' in basicsr_log.text) != is_known


def test_a_damaged_state_is_told_with_the_one_before(options, monkeypatch):
    monkeypatch.setattr(provenance, '_effective', {'train': options['train']})
    model = build_model(copy.deepcopy(options))
    for iteration in (2, 4, 10):
        model.save(0, iteration)
    folder = Path(options['path']['training_states'])
    opt = {**options, 'auto_resume': True}
    (folder / '10.state').write_bytes(b'')
    with pytest.raises(
        InputError, match=r'is damaged: it is empty. Without .*/10.state the run goes on from iteration 4\.$'
    ):
        load_resume_state(copy.deepcopy(opt))
    (folder / '10.state').unlink()
    with pytest.raises(InputError) as told:  # the one before is of the same options
        load_resume_state({**copy.deepcopy(opt), 'train': {'optim_g': {'type': 'NAdam'}}})
    assert 'must be Adam to resume' in str(told.value) and 'Without' not in str(told.value)
    (Path(options['path']['models']) / 'net_g_4.pth').unlink()
    with pytest.raises(
        InputError, match=r'net_g_4.pth is missing\. Without .*/4.state the run goes on from iteration 2\.$'
    ):
        load_resume_state(copy.deepcopy(opt))
    (folder / '2.state').unlink()
    with pytest.raises(InputError, match=r'net_g_4.pth is missing\.$'):
        load_resume_state(copy.deepcopy(opt))


def test_a_state_of_another_run_is_refused(options, tmp_path):
    model = build_model(copy.deepcopy(options))
    model.save(0, 4)
    path = f'{options["path"]["training_states"]}/4.state'
    other = {
        **options,
        'auto_resume': False,
        'path': {'training_states': str(tmp_path / 'other'), 'resume_state': path},
    }
    with pytest.raises(
        InputError, match='path.resume_state must be a state of this run, in .*/other, got .*4.state: go'
    ):
        load_resume_state(other)


def test_optimizers_that_are_not_finite_are_not_saved(options):
    """Of a loss of 1e25 the second moments are infinite, and nothing moves any more."""
    model = build_model(copy.deepcopy(options))
    rates(model, 1, 2)
    model.save(0, 2)
    next(iter(model.optimizers[0].state.values()))['exp_avg_sq'].fill_(torch.inf)
    with pytest.raises(
        DivergenceError, match='exp_avg_sq of Adam is no longer finite. The last checkpoint is of iteration 2'
    ):
        model.save(0, 4)
    assert sorted(path.name for path in Path(options['path']['training_states']).iterdir()) == ['2.state']


def test_the_best_metric_is_remembered(options):
    model = build_model(copy.deepcopy(options))
    model._initialize_best_metric_results('val')
    model._update_best_metric_result('val', 'psnr', torch.tensor(30.0).numpy()[()], 2)
    model.save(0, 4)
    state = dict(read_checkpoint(f'{options["path"]["training_states"]}/4.state'))
    other = build_model(copy.deepcopy(options))
    other.resume_training(state)
    other.save(0, 6)  # and stops once more before it validates
    state = dict(read_checkpoint(f'{options["path"]["training_states"]}/6.state'))
    options['val']['metrics']['niqe'] = {'type': 'calculate_niqe', 'crop_border': 2}
    other = build_model(copy.deepcopy(options))
    other.resume_training(state)
    other._initialize_best_metric_results('val')
    other._update_best_metric_result('val', 'psnr', 29.0, 8)
    other._initialize_best_metric_results('another')
    assert other.best_metric_results['val'] == {
        'psnr': {'better': 'higher', 'val': 30.0, 'iter': 2},
        'niqe': {'better': 'lower', 'val': float('inf'), 'iter': -1},
    }
    assert other.best_metric_results['another']['psnr']['iter'] == -1


# --- what is refused before anything is written ---

ADAPTSR = {'type': 'AdaptSR', 'base': {'type': 'MSRResNet'}, 'lora': {'groups': ['all'], 'rank': 2}}
DSCLORA = {'type': 'DSCLoRA', 'feature_channels': 8, 'rank': 2}


@pytest.mark.parametrize(
    ('network', 'path', 'value', 'sentence'),
    [
        (ADAPTSR, 'network_g.lora.rank', 4, 'network_g.lora.rank must be 2 to resume this run, got 4; a new run may'),
        (ADAPTSR, 'network_g.lora.alpha', 4, 'network_g.lora.alpha must be ~ to resume this run, got 4;'),
        (ADAPTSR, 'network_g.lora.also_train', ['bias'], "network_g.lora.also_train must be [] to resume this run"),
        (DSCLORA, 'network_g.rank', 4, 'network_g.rank must be 2 to resume this run, got 4;'),
        (DSCLORA, 'network_g.alpha', 4, 'network_g.alpha must be 16 to resume this run, got 4;'),
        (DSCLORA, 'network_g.type', 'SPAN', 'network_g.'),
        (DSCLORA, 'train.optim_g.type', 'torch.optim.Adam', None),
        (DSCLORA, 'train.optim_g.type', 'absent.Adam', 'train.optim_g.type must be Adam to resume this run'),
        (DSCLORA, 'train.optim_g.type', 'NAdam', 'train.optim_g.type must be Adam to resume this run, got NAdam;'),
        # The default, written out; and what is not LoRA's.
        (ADAPTSR, 'network_g.lora.alpha', None, None),
        (DSCLORA, 'network_g.alpha', 16, None),
        (ADAPTSR, 'network_g.base.res_scale', 1, None),
        (DSCLORA, 'train.optim_g.lr', 1, None),
    ],
)  # fmt: skip
def test_options_with_which_a_run_cannot_go_on(network, path, value, sentence):
    opt = {'network_g': copy.deepcopy(network), 'train': {'optim_g': {'type': 'Adam'}}, 'path': {'models': 'models'}}
    state = {'iter': 8, 'lora_sr': {'network': copy.deepcopy(network), 'optimizer_types': {'optim_g': 'Adam'}}}
    resume.check_options(opt, state)
    resume.check_options(opt, {'iter': 8})  # of BasicSR
    change(opt, path, value)
    if sentence is None:
        resume.check_options(opt, state)
        return
    with pytest.raises(InputError) as refused:
        resume.check_options(opt, state)
    assert str(refused.value).startswith(sentence) and 'models/net_g_8.pth' in str(refused.value)


# --- whole runs ---

COMMAND = ['-m', 'lora_sr.train', '-opt', 'tiny.yml']


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def write_run(folder, pairs, workers=0, ratio=3, **section):
    """13 iterations of a network that draws by itself, with dropped paths, in five epochs of BasicSR's or in one."""
    opt = yaml.safe_load(TINY_OPTIONS.format(root=pairs, suffix='', backend='disk').replace('1e-3', '0.001'))
    opt['datasets']['train'].update(num_worker_per_gpu=workers, dataset_enlarge_ratio=ratio, **section)
    arguments = dict(upscale=2, img_size=8, window_size=8, depths=[2], embed_dim=6, num_heads=[1], mlp_ratio=2)
    opt['network_g'] = {'type': 'SwinIR', 'upsampler': 'pixelshuffledirect', 'drop_path_rate': 0.5, **arguments}
    opt.update(manual_seed=None, model_type='SwinIRModel')
    opt['datasets']['train']['batch_size_per_gpu'] = 7  # of 24: three are left over
    opt['train'].update(total_iter=13, ema_decay=0.9)
    opt['logger']['save_checkpoint_freq'] = 5
    opt['val']['val_freq'] = 5  # which BasicSR does when it has saved: the training state knows nothing of it
    (folder / 'tiny.yml').write_text(yaml.safe_dump(opt, sort_keys=False))


@pytest.fixture(scope='module')
def whole(pairs, tmp_path_factory):
    """The files of such a run that did not stop."""
    folder = tmp_path_factory.mktemp('whole')
    write_run(folder, pairs)
    run_python(*COMMAND, '--force_yml', 'manual_seed=3', cwd=folder)
    return folder / 'experiments/tiny'


def keep(files, folder, iteration):
    """Leave in a folder what a run that was killed after an iteration had saved."""
    for name in (f'models/net_g_{iteration}.pth', f'training_states/{iteration}.state'):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(files / name, folder / name)


@pytest.mark.slow
@pytest.mark.parametrize('section', [{'workers': 4, 'persistent_workers': True}, {'prefetch_mode': 'cpu'}])
def test_a_run_that_stopped_equals_one_that_did_not(whole, pairs, tmp_path, section):
    """Weights, average, optimizer, scheduler, best metric and stream of samples, however these are read."""
    write_run(tmp_path, pairs, **section)
    keep(whole, tmp_path / 'experiments/tiny', 5)
    done = run_python(*COMMAND, '--auto_resume', cwd=tmp_path)  # with the seed of the run, though none is given
    assert sorted(logged(done)) == list(range(6, 14))
    assert_equal(tmp_path / 'experiments/tiny', whole)


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['', '.lmdb'])
def test_a_run_on_several_roots_that_stopped_equals_one_that_did_not(pairs, tmp_path, suffix):
    write_pairs(tmp_path / 'more', count=5, gt_size=40)
    roots = [str(tmp_path / 'more'), str(pairs)]
    section = {f'dataroot_{key}': [f'{root}/{key}{suffix}/' for root in roots] for key in ('gt', 'lq')}
    section['io_backend'] = {'type': 'lmdb' if suffix else 'disk'}
    for name, workers in (('whole', 0), ('stopped', 2)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, pairs, workers, **section)
    run_python(*COMMAND, '--force_yml', 'manual_seed=3', cwd=tmp_path / 'whole')
    keep(tmp_path / 'whole/experiments/tiny', tmp_path / 'stopped/experiments/tiny', 5)
    done = run_python(*COMMAND, '--auto_resume', cwd=tmp_path / 'stopped')
    assert sorted(logged(done)) == list(range(6, 14)) and 'Number of train images: 13' in done.stdout + done.stderr
    assert_equal(tmp_path / 'stopped/experiments/tiny', tmp_path / 'whole/experiments/tiny')


@pytest.mark.slow
def test_a_run_on_raw_images_that_stopped_equals_one_on_pngs(pairs, tmp_path):
    """That did not stop, and whose workers gave floating point."""
    prepare_databases([pairs / 'gt'], tmp_path, [2], [pairs / 'lq'], raw=True, progress=False)
    (tmp_path / 'whole').mkdir()
    roots = {'dataroot_gt': f'{pairs}/gt.lmdb', 'dataroot_lq': f'{pairs}/lq.lmdb', 'io_backend': {'type': 'lmdb'}}
    write_run(tmp_path / 'whole', pairs, **roots)
    run_python(*COMMAND, '--force_yml', 'manual_seed=3', cwd=tmp_path / 'whole')
    roots.update(dataroot_gt=f'{tmp_path}/HR_raw.lmdb', dataroot_lq=f'{tmp_path}/LR_X2_raw.lmdb')
    write_run(tmp_path, pairs, 2, type='RawPairedImageDataset', **roots)
    opt = yaml.safe_load((tmp_path / 'tiny.yml').read_text())
    opt['datasets']['val'].update(type='RawPairedImageDataset', **roots)
    (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(opt))
    keep(tmp_path / 'whole/experiments/tiny', tmp_path / 'experiments/tiny', 5)
    run_python(*COMMAND, '--auto_resume', cwd=tmp_path)
    assert_equal(tmp_path / 'experiments/tiny', tmp_path / 'whole/experiments/tiny')


@pytest.mark.slow
def test_two_processes_that_stopped_equal_two_that_did_not(pairs, tmp_path):
    write_run(tmp_path, pairs, workers=2, ratio=100)
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2]
    command = [*launcher, *COMMAND, '--launcher', 'pytorch']
    run_python(*command, '--force_yml', 'name=whole', 'manual_seed=3', cwd=tmp_path)
    keep(tmp_path / 'experiments/whole', tmp_path / 'experiments/tiny', 5)
    run_python(*command, '--auto_resume', cwd=tmp_path)
    assert_equal(tmp_path / 'experiments/tiny', tmp_path / 'experiments/whole')


def assert_equal(run, other):
    for name in ('models/net_g_10.pth', 'models/net_g_latest.pth', 'training_states/10.state'):
        contents = [dict(read_checkpoint(folder / name)) for folder in (run, other)]
        ours = [content.pop('lora_sr') for content in contents]
        assert same(*contents), name
        if name.endswith('state'):
            assert same(*({key: values[key] for key in ('samples', 'best', 'trained')} for values in ours))
            assert ours[0]['best']['val']['psnr']['iter'] == 5


@pytest.mark.slow
def test_refused_and_finished_runs(tiny_options, tmp_path):
    run_python(*COMMAND, cwd=tmp_path)
    record = (tmp_path / 'experiments/tiny/tiny.yml').read_text()
    refused = run_python(*COMMAND, '--auto_resume', '--force_yml', 'train:optim_g:type=NAdam', cwd=tmp_path, status=2)
    assert refused.stderr.count('error: ') == 1 and 'must be AdamW to resume this run, got NAdam' in refused.stderr
    assert (tmp_path / 'experiments/tiny/tiny.yml').read_text() == record  # of the run as it was
    more = run_python(*COMMAND, '--auto_resume', '--force_yml', 'train:total_iter=5', cwd=tmp_path)
    assert 'Nothing is left to train: the run is at iteration 6, and train.total_iter is 5.' in more.stderr
    assert not logged(more)
    more = run_python(
        *COMMAND, '--auto_resume', '--force_yml', 'train:total_iter=9', 'train:optim_g:lr=1e-5', cwd=tmp_path
    )
    assert logged(more) == {7: 2.5e-6, 8: 2.5e-6, 9: 2.5e-6}
    assert re.search(r'\[eta: 0:00:00, ', more.stderr) and 'eta: -1 day' not in more.stderr


def test_the_state_of_any_optimizer_is_taken(options):
    """Adafactor's averages are of rows and columns; others keep what is of no weight."""
    if not hasattr(torch.optim, 'Adafactor'):
        pytest.skip('this torch has none')
    options['train']['optim_g'] = {'type': 'Adafactor', 'lr': 1e-3}
    other, _ = go_on(options, {})
    states = other.optimizers[0].state
    assert any(
        value.shape != weight.shape for weight, values in states.items() for value in values.values() if value.ndim > 1
    )
    before = [name for _, name, _ in resume.moments_of(other.optimizers[0])]
    states['step'] = 3
    assert [name for _, name, _ in resume.moments_of(other.optimizers[0])] == before


@pytest.mark.parametrize(('name', 'settings'), [('SOAP', {'precondition_frequency': 3}), ('Amos', {})])
def test_an_optimizer_of_a_package_goes_on(options, name, settings):
    """SOAP keeps lists of matrices, and counts in its groups; Amos has a single number under a name of torch's."""
    pytest.importorskip('pytorch_optimizer')
    options['train']['optim_g'] = {'type': f'pytorch_optimizer.{name}', 'lr': 1e-3, **settings}

    def train(model, first, last):
        torch.manual_seed(first)
        rates(model, first, last)

    whole, stopped = (build_model(copy.deepcopy(options)) for _ in range(2))
    weights = copy.deepcopy(whole.net_g.state_dict())
    stopped.net_g.load_state_dict(weights)
    for model in (whole, stopped):
        train(model, 1, 6)
    stopped.save(0, 6)
    resumed = build_model(copy.deepcopy(options))
    resumed.net_g.load_state_dict(stopped.net_g.state_dict())
    resumed.resume_training(dict(read_checkpoint(f'{options["path"]["training_states"]}/6.state')))
    for model in (whole, resumed):
        train(model, 7, 10)
    for key, value in whole.net_g.state_dict().items():
        assert torch.equal(resumed.net_g.state_dict()[key], value) and not torch.equal(value, weights[key]), key
