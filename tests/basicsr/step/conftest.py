"""The options of small models, with a discriminator that takes a batch in parts."""

import pytest
import torch
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_steps import SWINIR, ConvDiscriminator


@pytest.fixture(autouse=True, scope='module')
def registered():
    ARCH_REGISTRY.register(ConvDiscriminator)
    yield
    del ARCH_REGISTRY._obj_map['ConvDiscriminator']


@pytest.fixture
def options(tmp_path):
    """A function: the options of a small model."""
    folders = {name: str(tmp_path / name) for name in ('models', 'training_states')}
    for name in folders:
        (tmp_path / name).mkdir()

    def make(model: str, **train) -> dict:
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
            opt['train'].update(
                optim_d={'type': 'Adam', 'lr': 1e-3}, gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla'}
            )
        if model == 'DistillationModel':
            torch.manual_seed(1)
            torch.save(MSRResNet(num_feat=4, num_block=4, upscale=2).state_dict(), tmp_path / 'teacher.pth')
            opt.update(network_t=network)
            opt['path'].update(pretrain_network_t=str(tmp_path / 'teacher.pth'))
            layers = {'type': 'SpatialAffinityLoss', 'layers': ['body.1']}
            opt['train'].update(distill_pixel_opt={'type': 'L1Loss'}, affinity_opt=layers)
        return opt

    return make
