"""Shipped option files by twos: what a train file trains, its test twin tests, here with tiny networks on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from basicsr.utils import logger as basicsr_logger
from tiny_run import REPOSITORY, write_pairs
from tiny_training import shrink, small_training

from lora_sr.cli.pipelines import main
from lora_sr.option_file import OptionDumper, load_options

OPTIONS = REPOSITORY / 'options'
# The quickstart's other networks are merged before they are tested, or only teach.
TRAINED = [*sorted((OPTIONS / 'train').rglob('train_*.yml')), OPTIONS / 'quickstart' / 'train_SPAN.yml']


def twin_of(train: Path) -> Path | None:
    """The test file whose name's parts the name of a train file holds, in their order; of several the longest."""

    def fits(test: Path) -> bool:
        parts = iter(train.stem.split('_')[1:])
        return all(part in parts for part in test.stem.split('_')[1:])

    folder = OPTIONS / 'test' / train.parent.name if train.parent.parent.name == 'train' else train.parent
    return max(filter(fits, folder.glob('test_*.yml')), key=lambda test: len(test.stem.split('_')), default=None)


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
