"""Shipped option files by twos: what a train file trains, its test twin tests, here with tiny networks on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.utils import logger as basicsr_logger
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_run import REPOSITORY, write_pairs

from lora_sr.cli.pipelines import main
from lora_sr.option_file import OptionDumper, load_options

OPTIONS = REPOSITORY / 'options'
# The quickstart's other networks are merged before they are tested, or only teach.
TRAINED = [*sorted((OPTIONS / 'train').rglob('train_*.yml')), OPTIONS / 'quickstart' / 'train_SPAN.yml']
LQ_SIZE = 16
DISCRIMINATOR = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}  # for any patches, as others are not
SMALL = {
    'SPAN': {'feature_channels': 8},
    'DSCLoRA': {'feature_channels': 8},
    'LKDN': {'num_feat': 8, 'num_atten': 8},
    'LKDN_S': {'num_feat': 8, 'num_atten': 8},
    'EDSR': {'num_feat': 8, 'num_block': 1},
    'RRDBNet': {'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4},
    'SwinIR': {'depths': [1], 'embed_dim': 12, 'num_heads': [2], 'img_size': LQ_SIZE},
}


def twin_of(train: Path) -> Path | None:
    """The test file whose name's parts the name of a train file holds, in their order; of several the longest."""

    def fits(test: Path) -> bool:
        parts = iter(train.stem.split('_')[1:])
        return all(part in parts for part in test.stem.split('_')[1:])

    folder = OPTIONS / 'test' / train.parent.name if train.parent.parent.name == 'train' else train.parent
    return max(filter(fits, folder.glob('test_*.yml')), key=lambda test: len(test.stem.split('_')), default=None)


def shrink(section: dict) -> None:
    inner = section['base'] if section['type'] == 'AdaptSR' else section
    inner.update(SMALL[inner['type']])


def write_weights(section: dict, file: Path, key: str | None) -> str:
    """Write random weights of the plain network that one is trained from."""
    section = dict(section.get('base', section))
    kind = section.pop('type')
    if kind == 'DSCLoRA':
        kind, section = 'SPAN', {name: section[name] for name in ('feature_channels', 'upscale')}
    weights = ARCH_REGISTRY.get(kind)(**section).state_dict()
    torch.save({key: weights} if key else weights, file)
    return str(file)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    made = {}

    def data_of(scale: int) -> Path:
        if scale not in made:
            made[scale] = tmp_path_factory.mktemp(f'x{scale}')
            write_pairs(made[scale], gt_size=24 * scale, scale=scale)
        return made[scale]

    return data_of


@pytest.fixture(autouse=True)
def own_logger(monkeypatch) -> Iterator[None]:
    """Each run logs for itself, and leaves no handler behind."""
    monkeypatch.setattr(basicsr_logger, 'initialized_logger', {})
    logger = logging.getLogger('basicsr')
    before = list(logger.handlers)
    yield
    for handler in [handler for handler in logger.handlers if handler not in before]:
        logger.removeHandler(handler)
        handler.close()


def small_training(file: Path, data: Path, folder: Path) -> dict:
    """Two iterations of a train file."""
    options = load_options(file)
    scale, path = options['scale'], options['path']
    options.update({'network_d': DISCRIMINATOR} if 'network_d' in options else {})
    for key in [key for key in ('network_g', 'network_t') if key in options]:
        shrink(options[key])
        pretrained = f'pretrain_{key}'
        if path.get(pretrained):
            weights = path.get(f'param_key_{key[-1]}', 'params')
            path[pretrained] = write_weights(options[key], folder / f'{key}.pth', weights)
    train = options['datasets']['train']
    sizes = {'gt_size': LQ_SIZE * scale, 'lq_size': LQ_SIZE}
    for section in (options, train):
        section.update({key: value for key, value in sizes.items() if key in section})
    degrades = train['type'] == 'RealESRGANDataset'
    train.update(io_backend={'type': 'lmdb'}, dataset_enlarge_ratio=100)
    train.update(batch_size_per_gpu=1 if degrades else 2, num_worker_per_gpu=int(degrades))
    train.update({f'dataroot_{key}': f'{data}/{key}.lmdb' for key in ('gt', 'lq') if f'dataroot_{key}' in train})
    options['datasets'] = {'train': train}
    options.pop('val', None)
    options['train'].update(total_iter=2)
    if options['train'].get('perceptual_opt'):
        options['train']['perceptual_opt'] = None  # it needs the weights of VGG
    options['logger'].update(print_freq=1, save_checkpoint_freq=2, use_tb_logger=False)
    return {**options, 'num_gpu': 0, **({'queue_size': 2} if degrades else {})}


def small_test(file: Path, data: Path, checkpoint: str) -> dict:
    """A test file on one small dataset."""
    options = load_options(file)
    shrink(options['network_g'])
    roots = {f'dataroot_{key}': f'{data}/{key}' for key in ('gt', 'lq')}
    options['datasets'] = {
        'test': {'name': 'tiny', 'type': 'PairedImageDataset', **roots, 'io_backend': {'type': 'disk'}}
    }
    options['val']['save_img'] = False
    options['path']['pretrain_network_g'] = checkpoint
    return {**options, 'num_gpu': 0}


def run(options: dict, is_train: bool) -> int:
    file = Path(f'{options["name"]}.yml')
    file.write_text(yaml.dump(options, Dumper=OptionDumper))
    return main(is_train, ['-opt', str(file)])


@pytest.mark.parametrize('file', TRAINED, ids=lambda file: file.stem)
def test_twin_is_there_and_tests_that_training(file):
    twin = twin_of(file)
    assert twin is not None
    train, test = load_options(file), load_options(twin)
    assert test['scale'] == train['scale']
    if file.stem.partition('_')[2] == twin.stem.partition('_')[2] and file.parent.name != 'quickstart':
        assert test['path']['pretrain_network_g'] == f'experiments/{train["name"]}/models/net_g_latest.pth'


@pytest.mark.slow
@pytest.mark.parametrize('file', TRAINED, ids=lambda file: file.stem)
def test_checkpoint_of_a_training_fits_its_twin(file, data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    train = small_training(file, data(load_options(file)['scale']), tmp_path)
    assert run(train, True) == 0, capfd.readouterr().err
    checkpoint = f'experiments/{train["name"]}/models/net_g_latest.pth'
    test = small_test(twin_of(file), data(train['scale']), checkpoint)
    assert run(test, False) == 0, capfd.readouterr().err
    assert '# psnr:' in capfd.readouterr().err
