"""The check of networks and of their checkpoints."""

import pytest
import torch
from basicsr.archs.swinir_arch import SwinIR
from option_check import check
from tiny_run import change

from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN


def test_names_with_the_suffix_of_basicsr_are_known(options, tmp_path):
    change(options, 'network_g', {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 2})
    assert check(options, tmp_path) == []


def test_network_that_needs_an_absent_file_is_one_sentence(options, tmp_path):
    change(options, 'network_g', {'type': 'BasicVSR', 'num_feat': 4, 'num_block': 1, 'spynet_path': 'absent.pth'})
    assert check(options, tmp_path) == [
        'network_g: the checkpoint absent.pth cannot be read: No such file or directory'
    ]


def adapted() -> dict:
    base = {'type': 'LKDN', 'num_feat': 4, 'num_atten': 4, 'num_block': 1, 'upscale': 2}
    return {'type': 'AdaptSR', 'base': base, 'lora': {'target_modules': ['B1\\..*', 'c1'], 'rank': 2}}


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('lora.rank', 2, None),
        ('lora.groups', ['attention', 'upsampler'], None),
        ('base', ..., 'network_g.base is missing'),
        ('base', 'LKDN', "network_g.base has to be a section of keys, not 'LKDN'"),
        ('base.type', 'LKDNS', "network_g.base.type: there is no network 'LKDNS'; did you mean LKDN"),
        ('base.num_feats', 4, 'network_g.base.num_feats is not a known key; the keys here are num_in_ch'),
        ('base.upscale', 3, 'network_g.base.upscale is 3, but scale is 2; they have to be equal'),
        ('base.upscale', ..., 'network_g.base.upscale is 4 by default in LKDN, but scale is 2; they have to be equal'),
        ('base.num_feat', 5, 'network_g.base: "num_feat" of LKDN is 5: it must be even'),
        ('base.num_block', {}, 'network_g.base.num_block has to be a number, not {}'),
        ('lora', ..., 'network_g.lora is missing'),
        ('lora', 8, 'network_g: "lora" of AdaptSR has to be a section, e.g. {groups: [all], rank: 8}, not 8'),
        ('lora.target_modules', ..., 'network_g: LoRA has neither groups nor target_modules: say what to adapt'),
        ('lora.target_modules', ['B1'], 'network_g: target_modules "B1" matches "B1", a LKDB, which cannot carry'),
        ('lora.target_modules', 3, 'network_g: "target_modules" of LoRA must be a list, got 3'),
        ('lora.groups', ['convs'], 'network_g: groups of LoRA has no "convs": did you mean "conv"?'),
        (
            'lora.groups',
            ['mlp'],
            'network_g: LKDN has no layer of the group "mlp"; its groups are conv, attention, ups',
        ),
        ('lora.also_train', ['position'], 'network_g: also_train of LoRA has "position", but LKDN has nothing of that'),
        ('lora.rank', 0, 'network_g: LoRA rank of "rank" must be an integer of at least 1, got 0'),
        ('lora.rank_pattern', {'c2': 4}, 'network_g: rank_pattern "c2" matches "c2", a BSConvU'),
        ('lora.target', ['c1'], 'network_g: Unknown LoRA option "target": did you mean "target_modules"?'),
        ('targets', ['c1'], 'network_g.targets is not a known key; the keys here are base, lora'),
    ],
)
def test_network_with_lora(options, tmp_path, path, value, sentence):
    change(options, 'network_g', adapted())
    base = LKDN(num_feat=4, num_atten=4, num_block=1, upscale=2)
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    change(options, f'network_g.{path}', value)
    problems = check(options, tmp_path)
    assert len(problems) == (sentence is not None), problems
    assert all(problem.startswith(sentence) for problem in problems)


SMALL_SWINIR = {'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'window_size': 4, 'mlp_ratio': 2, 'upscale': 2}


SMALL_SWINIR['upsampler'] = 'pixelshuffledirect'


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize(
    ('network', 'sentence'),
    [
        (LKDN(num_feat=4, num_atten=4, num_block=1, upscale=2), 'is a checkpoint of LKDN, not of SwinIR'),
        (SwinIR(img_size=8, **SMALL_SWINIR), 'is of a SwinIR with img_size 8, not 16'),
        (SwinIR(img_size=16, **SMALL_SWINIR), None),
    ],
)
def test_base_checkpoint_of_another_network(options, tmp_path, wrapped, network, sentence):
    torch.save({'params': network.state_dict()}, tmp_path / 'base.pth')
    base = {'type': 'SwinIR', 'img_size': 16, **SMALL_SWINIR}
    lora = {'type': 'AdaptSR', 'base': base, 'lora': {'groups': ['all'], 'rank': 2}}
    change(options, 'network_g', lora if wrapped else base)
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    expected = [f'path.pretrain_network_g: {tmp_path}/base.pth {sentence}'] if sentence else []
    assert check(options, tmp_path) == expected


def test_base_of_an_adapted_network_is_needed(options, tmp_path):
    change(options, 'network_g', adapted())
    missing = ['path.pretrain_network_g, the weights of the network that AdaptSR adapts, is missing']
    assert check(options, tmp_path) == missing
    for states in ('training_states/3.state', 'models/net_g_3.pth'):
        file = tmp_path / 'experiments' / options['name'] / states
        file.parent.mkdir(parents=True)
        torch.save({}, file)
    assert check({**options, 'auto_resume': True}, tmp_path) == []


def test_alpha_of_the_checkpoint_is_told(options, tmp_path):
    change(options, 'network_g', adapted())
    arguments = {key: value for key, value in adapted().items() if key != 'type'}
    for alpha, expected in ((2, []), (16, ['has alpha 16 in B1.c1_d, but network_g 2; give its alpha'])):
        network = AdaptSR(arguments['base'], {**arguments['lora'], 'alpha': alpha})
        torch.save({'params': network.state_dict()}, tmp_path / f'{alpha}.pth')
        change(options, 'path.pretrain_network_g', str(tmp_path / f'{alpha}.pth'))
        found = check(options, tmp_path)
        assert found == [f'path.pretrain_network_g: {tmp_path}/{alpha}.pth {sentence}' for sentence in expected]


LKDN_OF_4 = {'type': 'LKDN', 'num_feat': 4, 'num_atten': 4, 'num_block': 1}


SPAN_OF_4 = {'type': 'SPAN', 'feature_channels': 4}
DISP_OF_4 = {'type': 'DISP', 'feature_channels': 4}


@pytest.mark.parametrize(
    ('network', 'deploy', 'layers'),
    [
        (LKDN_OF_4, {}, 'upsampler.0'),
        (
            {**LKDN_OF_4, 'upsampler': 'pixelshuffle_rep'},
            {},
            'upsampler.conv1, upsampler.conv3, upsampler.conv3x3',
        ),
        (SPAN_OF_4, {}, 'upsampler.0'),
        (SPAN_OF_4, {'deploy': True}, 'upsampler.0'),  # folded on the way
        (SPAN_OF_4, {'type': 'DSCLoRA'}, 'upsampler.0'),
        (DISP_OF_4, {}, 'upsampler.0'),
    ],
)
def test_checkpoint_of_another_scale(options, tmp_path, network, deploy, layers):
    from basicsr.utils.registry import ARCH_REGISTRY

    arguments = {key: value for key, value in network.items() if key != 'type'}
    file = tmp_path / 'x4.pth'
    torch.save({'params': ARCH_REGISTRY.get(network['type'])(**arguments, upscale=4).state_dict()}, file)
    change(options, 'network_g', {**network, **deploy, 'upscale': 2})
    change(options, 'path.pretrain_network_g', str(file))
    sentence = f'path.pretrain_network_g: {file} is of scale 4 and network_g of scale 2: all but {layers} fits'
    assert check(options, tmp_path) == [f'{sentence}; to start from it, set path.strict_load_g: false']
    change(options, 'path.strict_load_g', False)
    assert check(options, tmp_path) == []

    change(options, 'path.strict_load_g', True)
    change(options, 'datasets', {'test': options['datasets']['val']})
    assert check(options, tmp_path, is_train=False) == [f'{sentence}; give a checkpoint of scale 2']


def test_checkpoint_of_another_scale_that_differs_elsewhere_too(options, tmp_path):
    torch.save({'params': LKDN(num_feat=4, num_atten=4, num_block=2).state_dict()}, tmp_path / 'x4.pth')
    change(options, 'network_g', {**LKDN_OF_4, 'upscale': 2})
    change(options, 'path.pretrain_network_g', str(tmp_path / 'x4.pth'))
    (problem,) = check(options, tmp_path)
    assert 'does not fit LKDN' in problem and 'scale' not in problem


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('kind', ['SPAN', 'DSCLoRA'])
def test_checkpoint_of_a_span_with_another_normalization(options, tmp_path, kind, norm):
    torch.save({'params': SPAN(feature_channels=6, upscale=2, norm=not norm).state_dict()}, tmp_path / 'base.pth')
    change(options, 'network_g', {'type': kind, 'feature_channels': 6, 'upscale': 2, 'norm': norm})
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    wanted, given = ('without', 'false, got true') if norm else ('with', 'true, got false')
    sentence = f'{tmp_path}/base.pth is of a SPAN {wanted} normalization: norm of network_g must be {given}'
    for strict in (True, False):  # it would load
        change(options, 'path.strict_load_g', strict)
        assert check(options, tmp_path) == [f'path.pretrain_network_g: {sentence}']
    change(options, 'network_g.norm', not norm)
    assert check(options, tmp_path) == []


def test_checkpoint_of_a_span_of_another_width_is_no_other_network(options, tmp_path):
    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'base.pth')
    change(options, 'network_g', {'type': 'DSCLoRA', 'feature_channels': 6, 'upscale': 2})
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    (problem,) = check(options, tmp_path)
    assert 'base.pth does not f' in problem and problem.endswith('has shape (12, 8, 3, 3) instead of (12, 6, 3, 3)')
