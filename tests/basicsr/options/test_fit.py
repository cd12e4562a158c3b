"""The check that network and images fit, against what the stock model does with them."""

import copy

import pytest
import torch
from basicsr.models import build_model
from tiny_run import change, write_pairs

from lora_sr.archs.registry import find_arch
from lora_sr.basicsr.options import check_options
from lora_sr.option_file import load_options

SWINIR = dict(type='SwinIR', upscale=2, img_size=8, window_size=8, depths=[1], embed_dim=4, num_heads=[1], mlp_ratio=2)
SWINIR['upsampler'] = 'pixelshuffledirect'
SEVENS = {**SWINIR, 'window_size': 7, 'img_size': 7}
RRDB = dict(type='RRDBNet', num_in_ch=3, num_out_ch=3, num_feat=4, num_block=1, num_grow_ch=2, scale=2)
ONE_CHANNEL = dict(type='MSRResNet', num_in_ch=1, num_out_ch=1, num_feat=4, num_block=1, upscale=2)


@pytest.fixture
def options(tiny_options):
    return load_options(tiny_options)  # GT 32x32 in patches of 16x16, scale 2


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'network_g': SWINIR}, None),
        ({'network_g': SWINIR, 'datasets.train.gt_size': 20},
         'gt_size must be a multiple of 16, since network_g (SwinIR) takes multiples of 8, got 20'),
        ({'network_g': SEVENS, 'datasets.train.gt_size': 28},
         "datasets.val must have LR images whose sizes are multiples of 7, for network_g (SwinIR), got '000.png'"),
        ({'network_g': RRDB}, None),
        ({'network_g': RRDB, 'datasets.train.gt_size': 18}, 'gt_size must be a multiple of 4, since network_g (R'),
        ({'network_g': ONE_CHANNEL}, 'datasets.train must give images of 1 channels to network_g (MSRResNet), got 3'),
        ({'network_g': ONE_CHANNEL, 'datasets.train.color': 'y', 'datasets.val.color': 'y'}, None),
        ({'val.metrics.psnr.crop_border': 15}, None),
        ({'val.metrics.psnr.crop_border': 16},
         'val.metrics.psnr.crop_border must leave calculate_psnr a pixel, got 16 for '
         "'000.png' of datasets.val, whose result has 32x32"),
        ({'val.metrics.psnr': {'type': 'calculate_ssim', 'crop_border': 10}}, None),
        ({'val.metrics.psnr': {'type': 'calculate_ssim', 'crop_border': 11}},
         'val.metrics.psnr.crop_border must leave calculate_ssim 11 pixels each way, got 11'),
        ({'val.metrics.psnr': {'type': 'calculate_niqe', 'crop_border': 0}},
         'val.metrics.psnr.crop_border must leave calculate_niqe two blocks of 96x96 pixels, got 0'),
        ({'datasets.train.color': 'y'}, 'datasets.train must give images of 3 channels to network_g (MSRResNet), got'),
    ],
)  # fmt: skip
def test_network_and_images(options, tmp_path, changes, sentence):
    """What passes trains and validates under `SRModel`; what is refused does not, or trains on nonsense."""
    for path, value in changes.items():
        change(options, path, copy.deepcopy(value))
    problems = check_options(options, True, tmp_path)
    if sentence is None:
        assert problems == []
        run(options, tmp_path, options['datasets']['train']['gt_size'] // 2)
        run(options, tmp_path, 16)
        return
    assert problems and problems[0].startswith(sentence), problems


def test_a_scale_that_a_network_does_not_have(options, tmp_path):
    """BasicSR's RRDBNet enlarges 4 times whatever scale it is given, but for 1 and 2."""
    write_pairs(tmp_path / 'pairs', gt_size=48, scale=3)
    roots = {f'dataroot_{kind}': str(tmp_path / 'pairs' / kind) for kind in ('gt', 'lq')}
    for section in options['datasets'].values():
        section.update(roots)
    options['datasets']['train']['gt_size'] = 18
    options.update(scale=3, network_g={**RRDB, 'scale': 3})
    assert check_options(options, True, tmp_path) == ['scale must be 4, by which network_g (RRDBNet) enlarges, got 3']
    options['network_g'] = {'type': 'MSRResNet', 'num_feat': 4, 'num_block': 1, 'upscale': 3}
    assert check_options(options, True, tmp_path) == []


def run(options, tmp_path, side):
    opt = copy.deepcopy(options)
    opt.update(is_train=True, dist=False, rank=0)
    opt['path'] = {'models': str(tmp_path), 'training_states': str(tmp_path)}
    model = build_model(opt)
    channels = 1 if opt['datasets']['train'].get('color') else 3
    batch = {'lq': torch.rand(1, channels, side, side), 'gt': torch.rand(1, channels, 2 * side, 2 * side)}
    model.update_learning_rate(1, -1)
    model.feed_data(batch)
    model.optimize_parameters(1)
    model.test()
    assert model.output.shape == batch['gt'].shape


def test_models_and_networks_that_pad(options, tmp_path):
    change(options, 'network_g', SEVENS)
    change(options, 'datasets.train.gt_size', 28)
    assert len(check_options(options, True, tmp_path)) == 1
    change(options, 'model_type', 'SwinIRModel')
    assert check_options(options, True, tmp_path) == []
    change(options, 'model_type', 'SRModel')
    torch.save({'params': find_arch('SwinIR')(**arguments(SEVENS)).state_dict()}, tmp_path / 'base.pth')
    change(options, 'network_g', {'type': 'AdaptSR', 'base': SEVENS, 'lora': {'groups': ['all'], 'rank': 1}})
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    change(options, 'datasets.train.gt_size', 16)
    assert check_options(options, True, tmp_path) == []


def arguments(section):
    return {key: value for key, value in section.items() if key != 'type'}
