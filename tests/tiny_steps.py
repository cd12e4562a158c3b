"""Steps of small models of BasicSR's and ours, in this process."""

import copy

import pytest
import torch
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.models import build_model
from torch import nn
from torch.nn import functional as F

SWINIR = dict(type='SwinIR', depths=[2, 2], embed_dim=8, num_heads=[2, 2], img_size=8, window_size=4, upscale=2)
SWINIR['upsampler'] = 'pixelshuffle'


class ConvDiscriminator(nn.Module):
    """Without norms, whose statistics would tell a whole batch from its parts, and smooth: rounding stays small."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3))

    def forward(self, x):
        return self.body(x)


def step_options(folder, model: str, **train) -> dict:
    """The options of a small model, as `parse_options` hands them over, which saves in a folder."""
    folders = {name: str(folder / name) for name in ('models', 'training_states')}
    for name in folders:
        (folder / name).mkdir(exist_ok=True)
    network = {'type': 'MSRResNet', 'num_feat': 4, 'num_block': 4, 'upscale': 2}
    opt = {
        **{'name': 'tiny', 'model_type': model, 'scale': 2, 'num_gpu': 0, 'is_train': True, 'dist': False},
        **{'rank': 0, 'world_size': 1, 'path': dict(folders), 'datasets': {'train': {'gt_size': 16}}},
        'network_g': network,
        **{'high_order_degradation': False, 'gt_usm': False, 'val': None},
        **{f'{key}_gt_usm': False for key in ('l1', 'percep', 'gan')},
        'train': {
            'ema_decay': 0.9,
            'total_iter': 20,
            'optim_g': {'type': 'Adam', 'lr': 1e-3},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [4], 'gamma': 0.5},
            'pixel_opt': {'type': 'L1Loss'},
            **train,
        },
    }
    if model == 'SwinIRModel':  # the random paths of a batch are not those of its parts
        opt['network_g'] = {**SWINIR, **({'drop_path_rate': 0} if 'accumulate_iter' in train else {})}
    if 'GAN' in model:
        opt['network_d'] = {'type': 'ConvDiscriminator'}
        opt['train'].update(optim_d={'type': 'Adam', 'lr': 1e-3}, gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla'})
    if model == 'DistillationModel':
        torch.manual_seed(1)
        torch.save(MSRResNet(num_feat=4, num_block=4, upscale=2).state_dict(), folder / 'teacher.pth')
        opt.update(network_t=network)
        opt['path'].update(pretrain_network_t=str(folder / 'teacher.pth'))
        layers = {'type': 'SpatialAffinityLoss', 'layers': ['body.1']}
        opt['train'].update(distill_pixel_opt={'type': 'L1Loss'}, affinity_opt=layers)
    return opt


def built(opt, seed=0):
    torch.manual_seed(seed)
    return build_model(copy.deepcopy(opt))


def steps(model, first, last, size=4):
    """Train iterations on batches of their own, and give back their losses."""
    told = []
    for iteration in range(first, last + 1):
        model.update_learning_rate(iteration)
        generator = torch.Generator().manual_seed(iteration)
        torch.manual_seed(iteration)  # as a run does, for DropPath
        side = 16 if type(model).__name__.startswith('Real') else 8  # of which twice has to hold what sharpens
        lq = torch.rand(size, 3, side, side, generator=generator)
        model.feed_data({'lq': lq, 'gt': F.interpolate(lq, scale_factor=2, mode='bicubic').clamp(0, 1)})
        model.optimize_parameters(iteration)
        told.append({key: float(value) for key, value in model.get_current_log().items()})
    return told


def weights(model):
    return {
        f'{name}.{key}': value
        for name in ('net_g', 'net_g_ema', 'net_d')
        if hasattr(model, name)
        for key, value in getattr(model, name).state_dict().items()
    }


def validated(model):
    """What the model makes of an image in a validation."""
    model.feed_data({'lq': torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(0))})
    model.test()
    return model.output


def assert_near(losses, expected, tolerance):
    assert [list(one) for one in losses] == [list(one) for one in expected]
    for one, other in zip(losses, expected):
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key
