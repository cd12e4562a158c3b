"""Shipped option files with each of their keys spoiled: a sentence that names the key, or nothing, but no traceback."""

import copy
import json
from pathlib import Path

import pytest
from option_check import paths_of
from tiny_run import REPOSITORY, change, write_pairs
from tiny_training import small_training

from lora_sr.basicsr.options import check_options

FILES = ['DSCLoRA/train_DSCLoRA_ch26_x4', 'AdaptSR/train_AdaptSR_SwinIR_x4', 'AdaptSR/train_AdaptSR-GAN_RRDB_x4']
VALUES = [
    None, True, 0, -1, 0.5, 10**30, float('nan'), float('inf'), '', 'x', 'y' * 3000, 'a\0b', '../x', [], [1], [[{}]],
    {}, {'a': 1},
]  # fmt: skip
VAL = {'val_freq': 2, 'save_img': False, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}}


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_spoiled_keys(tmp_path, name):
    write_pairs(tmp_path / 'data', count=2, gt_size=96, scale=4)
    options = small_training(REPOSITORY / 'options/train' / f'{name}.yml', tmp_path / 'data', tmp_path)
    roots = {f'dataroot_{kind}': str(tmp_path / 'data' / kind) for kind in ('gt', 'lq')}
    options['datasets']['val'] = {
        'name': 'v', 'type': 'PairedImageDataset', **roots, 'io_backend': {'type': 'disk'}
    }  # fmt: skip
    options = json.loads(json.dumps({**options, 'val': VAL}))
    assert check_options(options, True, tmp_path) == []

    def check(spoiled: dict) -> list[str]:
        problems = check_options(spoiled, True, tmp_path)
        assert all(len(problem) <= 300 and '\n' not in problem for problem in problems) and len(problems) <= 20
        return problems

    refused, paths = 0, paths_of(options)
    for index, path in enumerate(paths):
        key = path.rpartition('.')[2]
        # Of a network that can be built, but is another, its file tells; one that cannot may blame a key beside it.
        words = [key, 'path.pretrain_network', *(['network_'] if path.startswith('network_') else [])]
        for value in (*(VALUES * 2)[index * 2 % len(VALUES) :][:2], ...):  # all of them would take minutes
            spoiled = copy.deepcopy(options)
            change(spoiled, path, copy.deepcopy(value))
            problems = check(spoiled)
            assert not problems or any(word in problem for word in words for problem in problems), (path, problems)
            refused += bool(problems)
        spoiled = copy.deepcopy(options)
        change(spoiled, f'{path.rpartition(".")[0]}.unknown_sibling'.lstrip('.'), 1)
        assert any('unknown_sibling' in problem for problem in check(spoiled)), path
    assert refused > 2 * len(paths)


@pytest.mark.parametrize('section', ['', 'datasets', 'datasets.train', 'train.optim_g', 'network_g'])
def test_keys_that_are_no_texts(tmp_path, section):
    write_pairs(tmp_path / 'data', count=2, gt_size=96, scale=4)
    options = small_training(REPOSITORY / 'options/train' / f'{FILES[0]}.yml', tmp_path / 'data', Path(tmp_path))
    place = options
    for key in filter(None, section.split('.')):
        place = place[key]
    place[3] = 4
    sentence = f'the keys of {section or "the file"} must be texts, got 3'
    assert check_options(options, True, tmp_path) == [sentence]
