"""The check of option files for GAN models, degrading on the fly and perceptual loss: one sentence for each mistake."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from tiny_gan import tiny_gan_options, write_data
from tiny_run import change

from lora_sr.basicsr.options import check_options
from lora_sr.checkpoints import bounds
from lora_sr.option_file import OptionLoader

GAN = ['SRGANModel', 'ESRGANModel', 'RealESRGANModel']
MODELS = [*GAN, 'SRModel', 'RealESRNetModel']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data')
    write_data(root)
    return root


@pytest.fixture
def options(data):
    return lambda model: yaml.load(tiny_gan_options(model, data), Loader=OptionLoader)


@pytest.mark.parametrize('model', MODELS)
def test_correct_files(options, data, tmp_path, model):
    opt = options(model)
    before = str(opt)
    assert check_options(opt, True, tmp_path) == []
    assert str(opt) == before
    if model.startswith('Real'):
        del opt['datasets']['train']['meta_info']
        opt['datasets']['train'].update(dataroot_gt=f'{data}/gt.lmdb', io_backend={'type': 'lmdb'})
        opt['queue_size'] = 180
        assert check_options(opt, True, tmp_path) == []
        paired = options('SRModel')['datasets']['train']
        change(opt, 'datasets.train', paired)
        change(opt, 'high_order_degradation', False)
        for key in [key for key in opt if key.rstrip('2').endswith(('_prob', '_range')) or key == 'gt_size']:
            del opt[key]
        assert check_options(opt, True, tmp_path) == []


@pytest.mark.parametrize('model', GAN)
@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('network_d', ..., 'network_d is missing'),
        ('network_d.num_feat', 'x', "network_d.num_feat has to be a number, not 'x'"),
        ('network_d.num_in_ch', ..., 'network_d.num_in_ch is missing'),
        (
            'network_d.type',
            'UNetDiscriminator',
            "network_d.type: there is no network 'UNetDiscriminator'; did",
        ),
        (
            'network_d',
            {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 4},
            'network_d: VGGStyleDiscriminator does not take patches of gt_size 32: Input size must be identical',
        ),
        (
            'network_d',
            {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3, 'num_feat': 4, 'input_size': 32},
            'network_d.input_size: VGGStyleDiscriminator cannot be built with 32: input size must be 128 or 256',
        ),
        ('train.optim_d', ..., 'train.optim_d is missing'),
        ('train.optim_d.lr', ..., 'train.optim_d.lr is missing'),
        ('train.gan_opt', ..., 'train.gan_opt is missing'),
        ('train.gan_opt', None, 'train.gan_opt is missing'),
        (
            'train.gan_opt.gan_type',
            'vanila',
            "train.gan_opt.gan_type: GANLoss refuses 'vanila': GAN type vanila is not",
        ),
        ('train.gan_opt.gan_type', ..., 'train.gan_opt.gan_type is missing'),
        ('train.net_d_iters', 0, 'train.net_d_iters has to be a whole number of at least 1, not 0'),
        ('train.net_d_init_iters', -1, 'train.net_d_init_iters has to be a whole number of at least 0, not -1'),
        ('train.net_d_init_iter', 1, "train.net_d_init_iter is not a known key; did you mean 'net_d_init_iters'?"),
        ('train.pixel_opt', None, None),  # the discriminator alone teaches
        ('train.pixel_opt.reduction', 'men', "train.pixel_opt.reduction: L1Loss refuses 'men': Unsupported reduction"),
    ],
)
def test_mistakes_with_a_discriminator(options, tmp_path, model, path, value, sentence):
    opt = options(model)
    change(opt, path, value)
    problems = check_options(opt, True, tmp_path)
    assert len(problems) == (sentence is not None), problems
    assert all(problem.startswith(sentence) for problem in problems)


def test_patches_that_a_unet_cannot_halve(options, tmp_path):
    opt = options('SRGANModel')
    change(opt, 'datasets.train.gt_size', 36)
    (problem,) = check_options(opt, True, tmp_path)
    assert problem == 'network_d: UNetDiscriminatorSN does not take patches of gt_size 36: it has to be a multiple of 8'


def test_artifact_loss_needs_the_average(options, tmp_path):
    opt = options('RealESRGANModel')
    change(opt, 'train.ldl_opt', {'type': 'L1Loss'})
    assert check_options(opt, True, tmp_path) == []
    change(opt, 'train.ema_decay', 0)
    sentence = 'train.ldl_opt compares with the average of the weights; set train.ema_decay, e.g. to 0.999'
    assert check_options(opt, True, tmp_path) == [sentence]


@pytest.mark.parametrize('model', ['SRModel', 'RealESRNetModel'])
def test_no_loss(options, tmp_path, model):
    opt = options(model)
    change(opt, 'train.pixel_opt')
    sentence = f'train.pixel_opt and train.perceptual_opt are both missing; {model} needs one of them'
    assert check_options(opt, True, tmp_path) == [sentence]


# --- degrading on the fly ---

BLURS = 'iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso'
KEYS = """resize_prob resize_range gaussian_noise_prob noise_range poisson_scale_range gray_noise_prob jpeg_range
    second_blur_prob resize_prob2 resize_range2 gaussian_noise_prob2 noise_range2 poisson_scale_range2 gray_noise_prob2
    jpeg_range2 gt_size""".split()
DATASET_KEYS = """dataroot_gt io_backend meta_info use_hflip use_rot blur_kernel_size kernel_list kernel_prob blur_sigma
    betag_range betap_range sinc_prob blur_kernel_size2 kernel_list2 kernel_prob2 blur_sigma2 betag_range2 betap_range2
    sinc_prob2 final_sinc_prob""".split()


@pytest.mark.parametrize(
    ('model', 'keys'),
    [('RealESRNetModel', ['gt_usm']), ('RealESRGANModel', ['l1_gt_usm', 'percep_gt_usm', 'gan_gt_usm'])],
)
def test_missing_keys(options, tmp_path, model, keys):
    for key in [*KEYS, *keys]:
        opt = options(model)
        change(opt, key)
        assert check_options(opt, True, tmp_path) == [f'{key} is missing']
    for key in DATASET_KEYS:
        opt = options(model)
        change(opt, f'datasets.train.{key}')
        assert check_options(opt, True, tmp_path) == [f'datasets.train.{key} is missing']


@pytest.mark.parametrize('model', ['RealESRNetModel', 'RealESRGANModel'])
@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('resize_prob', [0.5, 0.5], 'resize_prob has to be 3 weights (up, down, as it is) of at least 0 that are not'),
        ('resize_prob2', [0, 0, 0], 'resize_prob2 has to be 3 weights (up, down, as it is) of at least 0 that are not'),
        ('resize_range', 1.5, 'resize_range has to be two numbers from 0, the second at least the first, not 1.5'),
        (
            'noise_range2',
            [5, 1],
            'noise_range2 has to be two numbers from 0, the second at least the first, not [5',
        ),
        ('jpeg_range', [0, 95], 'jpeg_range has to be two numbers from 1, the second at least the first, not [0, 95]'),
        ('gray_noise_prob', 1.1, 'gray_noise_prob has to be a number from 0 to 1, not 1.1'),
        ('second_blur_prob', 'x', "second_blur_prob has to be a number from 0 to 1, not 'x'"),
        ('gt_size', 34, 'gt_size is 34, which has to be a multiple of scale (4), and at most 400'),
        ('gt_size', 408, 'gt_size is 408, which has to be a multiple of scale (4), and at most 400'),
        ('gt_size', 'x', "gt_size has to be a whole number of at least 1, not 'x'"),
        ('queue_size', 0, 'queue_size has to be a whole number of at least 1, not 0'),
        (
            'datasets.train.batch_size_per_gpu',
            7,
            'queue_size is 2, which has to be a multiple of the batch of 7',
        ),
        ('datasets.train.kernel_list', ['iso', 'x'], f'datasets.train.kernel_list has to be a list of {BLURS}, not'),
        ('datasets.train.kernel_list2', ['iso'], 'datasets.train.kernel_prob2 has to be 1 weights'),
        ('datasets.train.kernel_prob', [1, -1], 'datasets.train.kernel_prob has to be 2 weights'),
        (
            'datasets.train.blur_sigma',
            [1, 1],
            'datasets.train.blur_sigma has to be two numbers from 0, the second m',
        ),
        ('datasets.train.betap_range2', 1, 'datasets.train.betap_range2 has to be two numbers from 0, the second at'),
        ('datasets.train.final_sinc_prob', 8, 'datasets.train.final_sinc_prob has to be a number from 0 to 1, not 8'),
        ('datasets.train.meta_info', 'no.txt', 'datasets.train.meta_info: no.txt cannot be read: No such file'),
        ('datasets.train.dataroot_gt', 'no', 'datasets.train.dataroot_gt: no does not exist'),
        ('datasets.train.io_backend', {'type': 'zip'}, 'datasets.train.io_backend has to be'),
        ('datasets.train.io_backend', {'type': 'lmdb'}, 'datasets.train.dataroot_gt: the name of {data}/gt has to end'),
        ('high_order_degradation', False, 'datasets.train: a RealESRGANDataset has no LR images; it needs high_order'),
    ],
)
def test_degradations(options, data, tmp_path, model, path, value, sentence):
    opt = options(model)
    change(opt, path, value)
    problems = check_options(opt, True, tmp_path)
    assert len(problems) == 1, problems
    assert problems[0].startswith(sentence.format(data=data))


def test_data_for_less_than_a_batch(options, tmp_path):
    opt = options('RealESRNetModel')
    opt['queue_size'] = 50
    opt['datasets']['train'].update(batch_size_per_gpu=50, dataset_enlarge_ratio=1)
    (problem,) = check_options(opt, True, tmp_path)
    assert re.match(r'datasets.train.batch_size_per_gpu must be at most \d, the patches of an epoch, got 50; ', problem)


def test_flags_are_true_or_false(options, tmp_path):
    opt = options('RealESRGANModel')
    change(opt, 'gan_gt_usm', 'no')
    assert check_options(opt, True, tmp_path) == ["gan_gt_usm has to be true or false, not 'no'"]


def test_scale_that_does_not_divide_the_patches(options, data, tmp_path):
    opt = options('RealESRNetModel')
    change(opt, 'scale', 3)
    change(opt, 'network_g', {'type': 'MSRResNet', 'num_feat': 4, 'num_block': 1, 'upscale': 3})
    change(opt, 'path.pretrain_network_g', None)
    change(opt, 'datasets.val')
    sentence = 'scale is 3, but a RealESRGANDataset gives patches of 400 pixels, which has to be a multiple of it'
    assert check_options(opt, True, tmp_path) == [sentence]


def test_misspelt_keys(options, tmp_path):
    opt = options('RealESRGANModel')
    opt['poison_scale_range'] = opt.pop('poisson_scale_range')
    train = opt['datasets']['train']
    train['kernel_probs2'] = train.pop('kernel_prob2')
    opt['queue_sizes'] = opt.pop('queue_size')
    assert check_options(opt, True, tmp_path) == [
        "poison_scale_range is not a known key; did you mean 'poisson_scale_range'?",
        "queue_sizes is not a known key; did you mean 'queue_size'?",
        "datasets.train.kernel_probs2 is not a known key; did you mean 'kernel_prob2'?",
    ]


@pytest.mark.parametrize('model', ['SRModel', 'SRGANModel', 'ESRGANModel'])
def test_models_that_need_lr_images(options, tmp_path, model):
    opt = options(model)
    change(opt, 'datasets.train', options('RealESRGANModel')['datasets']['train'])
    sentence = 'a RealESRGANDataset has no LR images; it needs model_type: RealESRNetModel or RealESRGANModel'
    assert f'datasets.train: {sentence}' in check_options(opt, True, tmp_path)


def test_models_that_make_lr_images(options, tmp_path):
    opt = options('RealESRGANModel')
    change(opt, 'datasets.val', dict(opt['datasets']['train'], name='val'))
    change(opt, 'datasets.train', options('SRModel')['datasets']['train'])
    assert check_options(opt, True, tmp_path) == [
        'datasets.train: RealESRGANModel makes LR images itself, from a RealESRGANDataset; for pairs set '
        'high_order_degradation: false',
        'datasets.val: a RealESRGANDataset has no LR images to measure with; use a PairedImageDataset',
    ]


@pytest.mark.parametrize('backend', ['disk', 'lmdb'])
def test_damaged_images(options, data, tmp_path, backend):
    shutil.copytree(data, tmp_path / 'data')
    opt = options('RealESRNetModel')
    train, root = opt['datasets']['train'], tmp_path / 'data'
    names = root / 'names.txt'
    if backend == 'lmdb':
        train.update(dataroot_gt=f'{root}/gt.lmdb', io_backend={'type': 'lmdb'})
        (root / 'gt.lmdb/meta_info.txt').unlink()
        (problem,) = check_options(opt, True, tmp_path)
        assert problem.startswith(f'datasets.train.dataroot_gt: {root}/gt.lmdb/meta_info.txt cannot be read')
        return
    train.update(dataroot_gt=f'{root}/gt', meta_info=str(names))
    assert check_options(opt, True, tmp_path) == []
    (root / 'gt/005.png').write_bytes((root / 'gt/005.png').read_bytes()[:-100])
    sentence = f'datasets.train.dataroot_gt: {root}/gt/005.png is not an image, or a damaged one'
    assert check_options(opt, True, tmp_path) == [sentence]
    names.write_text(names.read_text() + '\nsub/9.png\n')  # an empty line, too
    sentence = f"datasets.train.meta_info: '' and 1 more are missing in dataroot_gt ({root}/gt)"
    assert check_options(opt, True, tmp_path) == [sentence]
    names.write_text('')
    (problem,) = check_options(opt, True, tmp_path)
    assert problem.startswith(f'datasets.train.meta_info: {names} is empty')
    names.unlink()
    os.mkfifo(names)  # which would be waited for
    (problem,) = check_options(opt, True, tmp_path)
    assert problem.startswith(
        f'datasets.train.meta_info: the list {names} cannot be read: it must be a file, got a pipe'
    )


# --- perceptual loss ---


def write_vgg(file: Path, kind: str) -> None:
    """A file that fits a VGG of torchvision, with tensors that share a zero."""
    with torch.device('meta'):
        shapes = {key: value.shape for key, value in getattr(torchvision.models, kind)().state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, file)


@pytest.fixture(autouse=True)
def shared_zeros(monkeypatch):
    """Else such a file would be refused."""
    monkeypatch.setattr(bounds, 'SMALL_BYTES', 2**30)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def perceptual(options):
    def options_for(model='SRGANModel', **section):
        opt = options(model)
        opt['train']['perceptual_opt'] = {'type': 'PerceptualLoss', 'layer_weights': {'conv5_4': 1.0}, **section}
        return opt

    return options_for


@pytest.mark.parametrize('model', MODELS)
def test_no_weights_of_vgg(perceptual, hub, tmp_path, model):
    url = 'https://download.pytorch.org/models/vgg19-dcbb9e9d.pth'
    sentence = (
        f"train.perceptual_opt needs the weights of vgg19: put torchvision's vgg19-dcbb9e9d.pth ({url}) into "
        f'{tmp_path}/experiments/pretrained_models, or train without perceptual_opt'
    )
    assert check_options(perceptual(model), True, tmp_path) == [sentence]
    write_vgg(hub / 'vgg19-dcbb9e9d.pth', 'vgg19')  # where torchvision looks itself
    assert check_options(perceptual(model), True, tmp_path) == []


def test_file_of_vgg19(perceptual, hub, tmp_path):
    own = tmp_path / 'experiments/pretrained_models/vgg19-dcbb9e9d.pth'
    write_vgg(own, 'vgg19')
    assert check_options(perceptual(), True, tmp_path) == []

    # BasicSR takes it for every kind.
    write_vgg(hub / 'vgg16-397923af.pth', 'vgg16')
    vgg16 = perceptual(vgg_type='vgg16', layer_weights={'conv5_3': 1.0})
    assert check_options(vgg16, True, tmp_path) == [
        f'train.perceptual_opt: {own} does not fit vgg16: features.17.weight is not there; BasicSR reads it for every '
        'vgg_type: put it elsewhere, or set vgg_type: vgg19'
    ]
    own.rename(tmp_path / 'away.pth')
    assert check_options(vgg16, True, tmp_path) == []

    own.write_bytes((tmp_path / 'away.pth').read_bytes()[:-1000])
    (problem,) = check_options(perceptual(), True, tmp_path)
    assert problem.startswith(f'train.perceptual_opt: the checkpoint {own} ')


def test_damaged_or_other_file_of_torchvision(perceptual, hub, tmp_path):
    file = hub / 'vgg19-dcbb9e9d.pth'
    write_vgg(file, 'vgg16')
    (problem,) = check_options(perceptual(), True, tmp_path)
    assert problem == f'train.perceptual_opt: {file} does not fit vgg19: features.16.weight is not there'
    file.write_bytes(b'PK')
    (problem,) = check_options(perceptual(), True, tmp_path)
    assert problem.startswith(f'train.perceptual_opt: the checkpoint {file} is damaged')


def test_weights_of_another_vgg(perceptual, hub, tmp_path):
    opt = perceptual(vgg_type='vgg13_bn', layer_weights={'bn5_2': 1.0})
    (problem,) = check_options(opt, True, tmp_path)
    assert problem.startswith('train.perceptual_opt needs the weights of vgg13_bn: put ') and f'into {hub}' in problem
    write_vgg(hub / torchvision.models.VGG13_BN_Weights.IMAGENET1K_V1.url.rpartition('/')[2], 'vgg13_bn')
    assert check_options(opt, True, tmp_path) == []


@pytest.mark.parametrize(
    ('key', 'value', 'sentence'),
    [
        ('criterion', 'l2', None),
        ('criterion', 'l3', "train.perceptual_opt.criterion: there is no 'l3'; it is one of l1, l2, fro"),
        ('vgg_type', 'vgg18', "train.perceptual_opt.vgg_type: there is no network 'vgg18'; known are vgg11, vgg11_bn"),
        (
            'layer_weights',
            {'conv5_5': 1.0},
            "train.perceptual_opt.layer_weights: there is no layer 'conv5_5' in vgg19; did you mean conv5_4 or",
        ),
        ('layer_weights', ['conv5_4'], 'train.perceptual_opt.layer_weights has to be a section of layers, e.g. '),
        ('layer_weights', {}, 'train.perceptual_opt.layer_weights has to be a section of layers, e.g. '),
        ('pooling', 2, 'train.perceptual_opt.pooling is not a known key; the keys here are layer_weights'),
    ],
)
def test_mistakes_of_the_perceptual_loss(perceptual, hub, tmp_path, key, value, sentence):
    write_vgg(hub / 'vgg19-dcbb9e9d.pth', 'vgg19')
    problems = check_options(perceptual(**{key: value}), True, tmp_path)
    assert len(problems) == (sentence is not None), problems
    assert all(problem.startswith(sentence) for problem in problems)
