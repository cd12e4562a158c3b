"""BasicSR's GAN models and Real-ESRGAN's models over a generator with LoRA, from option files and by hand."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.swinir_arch import SwinIR
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_gan import tiny_gan_options, write_data
from tiny_run import REPOSITORY, run_python

from lora_sr.adapters import is_lora_key
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.option_file import OptionLoader, load_options

OPTIONS = REPOSITORY / 'options' / 'train' / 'AdaptSR'
VGG = 'experiments/pretrained_models/vgg19-dcbb9e9d.pth'

TINY_SWINIR = dict(depths=[1], embed_dim=8, num_heads=[2], img_size=16, upscale=4, upsampler='pixelshuffle')
TINY_SWINIR.update(window_size=8, mlp_ratio=2)
TINY_RRDB = dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, num_grow_ch=4)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """What `write_data` writes."""
    root = tmp_path_factory.mktemp('data')
    write_data(root)
    return root


@pytest.fixture(scope='module')
def vgg_file(tmp_path_factory) -> Path:
    """A file that fits VGG19: random convolutions; its classifier, which nobody reads, is zeros that share memory."""
    generator = torch.Generator().manual_seed(0)
    with torch.device('meta'):
        shapes = {key: value.shape for key, value in torchvision.models.vgg19().state_dict().items()}
    weights = {
        key: torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if key.startswith('features') and key.endswith('weight')
        else torch.zeros(1).expand(shape)
        for key, shape in shapes.items()
    }
    file = tmp_path_factory.mktemp('vgg') / 'vgg19.pth'
    torch.save(weights, file)
    return file


def train(file, *changes, cwd):
    """Train an option file on the CPU, with changes as for `--force_yml`. Gives back log and folder of models."""
    overrides = ['num_gpu=0', 'val=~', 'logger:print_freq=1', 'logger:use_tb_logger=false']
    done = run_python('-m', 'lora_sr.train', '-opt', file, '--force_yml', *overrides, *changes, cwd=cwd)
    return done.stderr, cwd / 'experiments' / load_options(file)['name'] / 'models'


def shipped(name: str, data: Path) -> list:
    """The changes that make a shipped GAN option file tiny: ten iterations on `data`."""
    changes = ['train:total_iter=10', 'datasets:train:num_worker_per_gpu=0', 'network_g:lora:rank=2']
    for key, dataset in load_options(OPTIONS / name)['datasets'].items():
        for kind in [kind for kind in ('gt', 'lq') if f'dataroot_{kind}' in dataset]:
            end = '.lmdb' if dataset['io_backend']['type'] == 'lmdb' else ''
            changes.append(f'datasets:{key}:dataroot_{kind}={data}/{kind}{end}')
    return changes


def losses(log: str, name: str) -> list:
    return [float(value) for value in re.findall(rf' {name}: (\S+)', log)]


def moved(models: Path, before: dict) -> dict:
    """How many `lora_B` of a checkpoint have moved, by its key; and all but LoRA has to be as it was, to the bit."""
    counts = {}
    content = read_checkpoint(models / 'net_g_latest.pth')
    for key in content.keys() - {'lora_sr'}:  # where it comes from
        weights = content[key]
        assert {name for name in weights if not is_lora_key(name)} == {name for name in before if not is_lora_key(name)}
        for name, value in weights.items():
            if not is_lora_key(name):
                assert torch.equal(value, before[name]), (key, name)
        starts = {name: before.get(name, torch.zeros(())) for name in weights if name.endswith('lora_B')}
        counts[key] = sum(bool((weights[name] != start).any()) for name, start in starts.items())
    return counts


@pytest.mark.slow
def test_shipped_swinir_degraded_on_the_fly(data, vgg_file, tmp_path):
    torch.manual_seed(0)
    base = SwinIR(**TINY_SWINIR)
    torch.save({'params': base.state_dict()}, tmp_path / 'start.pth')
    (tmp_path / VGG).parent.mkdir(parents=True)
    (tmp_path / VGG).symlink_to(vgg_file)
    name = 'train_AdaptSR-GAN_SwinIR_x4.yml'
    sizes = [f'network_g:base:{key}={TINY_SWINIR[key]}' for key in ('depths', 'embed_dim', 'num_heads', 'img_size')]
    sizes += ['network_d:num_feat=4', 'gt_size=64', 'queue_size=4', 'datasets:train:batch_size_per_gpu=1']
    sizes += ['datasets:train:dataset_enlarge_ratio=2', f'path:pretrain_network_g={tmp_path}/start.pth']
    log, models = train(OPTIONS / name, *shipped(name, data), *sizes, cwd=tmp_path)
    layers = sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) for module in base.modules())
    assert moved(models, base.state_dict()) == {'params': layers, 'params_ema': layers}
    for loss in ('l_g_pix', 'l_g_percep', 'l_g_gan', 'l_d_real', 'l_d_fake'):
        assert len(losses(log, loss)) == 10 and all(0 < value < 100 for value in losses(log, loss)), loss


@pytest.mark.slow
def test_shipped_rrdb_goes_on_from_an_adapted_network(data, tmp_path):
    torch.manual_seed(0)
    section = {'base': {'type': 'RRDBNet', **TINY_RRDB}, 'lora': {'groups': ['all'], 'rank': 2}}
    adapted = ARCH_REGISTRY.get('AdaptSR')(**section).state_dict()
    for key, value in adapted.items():
        if key.endswith('lora_B'):
            value.normal_(0, 0.01)
    torch.save({'params_ema': adapted}, tmp_path / 'start.pth')
    name = 'train_AdaptSR-GAN_RRDB_x4.yml'
    sizes = [f'network_g:base:{key}={TINY_RRDB[key]}' for key in ('num_feat', 'num_block', 'num_grow_ch')]
    sizes += ['network_d:num_feat=4', 'datasets:train:batch_size_per_gpu=2']
    sizes += [f'path:pretrain_network_g={tmp_path}/start.pth', 'train:perceptual_opt=~']
    log, models = train(OPTIONS / name, *shipped(name, data), *sizes, cwd=tmp_path)
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in RRDBNet(**TINY_RRDB).modules())
    assert moved(models, adapted) == {'params': layers, 'params_ema': layers}
    for loss in ('l_g_pix', 'l_g_gan', 'l_d_real', 'l_d_fake'):
        assert len(losses(log, loss)) == 10, loss


# --- option files of one's own ---


@pytest.mark.slow
def test_degraded_images_without_a_discriminator(data, tmp_path):
    """From a folder, with its list of names and a worker."""
    (tmp_path / 'tiny.yml').write_text(tiny_gan_options('RealESRNetModel', data))
    done = run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', cwd=tmp_path)
    assert len(losses(done.stderr, 'l_pix')) == 2
    assert done.stderr.count('# psnr: ') == 2  # at both iterations


@pytest.mark.slow
def test_gan_resumes(data, tmp_path):
    (tmp_path / 'tiny.yml').write_text(tiny_gan_options('SRGANModel', data))
    command = ['-m', 'lora_sr.train', '-opt', 'tiny.yml', '--auto_resume']
    run_python(*command, '--force_yml', 'train:total_iter=1', cwd=tmp_path)
    folder = tmp_path / 'experiments' / 'tiny'
    before = {name: read_checkpoint(folder / 'models' / f'net_{name}_1.pth') for name in 'gd'}
    done = run_python(*command, cwd=tmp_path)
    assert 'Resuming training from epoch: 0, iter: 1.' in done.stderr
    for network, name, key in (('MSRResNet', 'g', 'params'), ('MSRResNet', 'g', 'params_ema'), ('UNet', 'd', 'params')):
        assert re.search(rf'Loading {network}\w* model from {folder}/models/net_{name}_1.pth, .*\[{key}\]', done.stderr)
    state = read_checkpoint(folder / 'training_states' / '2.state')
    for name, optimizer in zip('gd', state['optimizers']):
        assert {int(one['step']) for one in optimizer['state'].values()} == {2}, name
        after = read_checkpoint(folder / 'models' / f'net_{name}_2.pth')
        keys = {'params', 'params_ema', 'lora_sr'} if name == 'g' else {'params', 'lora_sr'}
        assert after.keys() == before[name].keys() == keys
        for key in keys - {'lora_sr'}:
            weights = after[key]
            trained = [tensor for tensor in weights if name == 'd' or tensor.endswith(('lora_A', 'lora_B'))]
            for tensor, value in weights.items():
                assert torch.equal(value, before[name][key][tensor]) != (tensor in trained), (name, key, tensor)


@pytest.mark.slow
def test_degradations_and_their_pool_go_on(data, tmp_path):
    """A run that stopped after three iterations, of which the first filled the pool, ends as one that did not."""
    (tmp_path / 'tiny.yml').write_text(tiny_gan_options('RealESRNetModel', data))
    command = ['-m', 'lora_sr.train', '-opt', 'tiny.yml', '--auto_resume', '--force_yml']
    command += ['train:total_iter=6', 'logger:save_checkpoint_freq=1', 'val:val_freq=100']
    run_python(*command, 'name=whole', cwd=tmp_path)
    whole, tiny = (tmp_path / 'experiments' / name for name in ('whole', 'tiny'))
    for name in ('models/net_g_3.pth', 'training_states/3.state'):
        (tiny / name).parent.mkdir(parents=True)
        shutil.copy(whole / name, tiny / name)
    run_python(*command, cwd=tmp_path)
    own, pools = [], []
    for folder in (whole, tiny):
        own.append(read_checkpoint(folder / 'models/net_g_6.pth')['params'])
        pools.append(read_checkpoint(folder / 'training_states/6.state')['lora_sr']['pool'])
    assert all(torch.equal(value, own[1][key]) for key, value in own[0].items())
    assert all(torch.equal(pools[0][key], pools[1][key]) for key in ('lr', 'gt')) and pools[0]['lr'].any()
    assert pools[0]['lr'].dtype == torch.uint8 and pools[0]['filled'] == pools[1]['filled'] == 2


# --- models by hand ---


def build(model: str, **changes):
    """A model of BasicSR with a tiny generator under LoRA, on the CPU, and its batch of 4x pairs."""
    opt = yaml.load(tiny_gan_options(model, 'data'), Loader=OptionLoader)
    opt.update(is_train=True, dist=False, path={'pretrain_network_g': None})
    for key, value in changes.items():
        opt['train'][key] = value
    torch.manual_seed(0)
    one = build_model(copy.deepcopy(opt))
    torch.manual_seed(1)
    return one, {'lq': torch.rand(2, 3, 8, 8), 'gt': torch.rand(2, 3, 32, 32)}


OPTIMIZERS = ['Adam', 'AdamW', 'SGD', 'RMSprop', 'Adagrad', 'Adadelta', 'Adamax', 'NAdam', 'RAdam', 'ASGD', 'Adan']


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('model', ['SRGANModel', 'ESRGANModel'])
def test_frozen_tensors_stay_under_weight_decay(model, optimizer):
    """BasicSR hands all tensors of a generator to the optimizer, the frozen ones too."""
    one, batch = build(model, optim_g={'type': optimizer, 'lr': 0.1, 'weight_decay': 0.5})
    before = copy.deepcopy(one.net_g.state_dict())
    discriminator = copy.deepcopy(one.net_d.state_dict())
    assert sum(len(group['params']) for group in one.optimizer_g.param_groups) == len(list(one.net_g.parameters()))
    for iteration in (1, 2):
        one.feed_data(batch)
        one.optimize_parameters(iteration)
    for network in (one.net_g, one.net_g_ema):
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[key]) != key.endswith(('lora_A', 'lora_B')), key
    assert any(not torch.equal(value, discriminator[key]) for key, value in one.net_d.state_dict().items())


@pytest.mark.parametrize('model', ['SRGANModel', 'ESRGANModel', 'RealESRGANModel'])
def test_average_of_a_gan(model):
    """The average starts as the network, `lora_A` as well, and follows it."""
    one, batch = build(model, ema_decay=0.75)
    start = copy.deepcopy(one.net_g.state_dict())
    for key, value in one.net_g_ema.state_dict().items():
        assert torch.equal(value, start[key]), key
    one.opt['high_order_degradation'] = False
    one.feed_data(batch)
    one.optimize_parameters(1)
    for key, value in one.net_g.state_dict().items():
        torch.testing.assert_close(one.net_g_ema.state_dict()[key], 0.75 * start[key] + 0.25 * value, rtol=1e-5, atol=0)
