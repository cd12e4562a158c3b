"""``scripts/adaptation_study.py``: each way to train begins at the network, within its budget, and is measured."""

import importlib.util
import json
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lora_sr.adapt import adapting
from lora_sr.adapt.option_text import option_text
from lora_sr.archs import LKDN

SCRIPT = Path(__file__).resolve().parents[2] / 'scripts' / 'adaptation_study.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('adaptation_study', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules['adaptation_study'] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules['adaptation_study']


@pytest.fixture
def call(camera, tmp_path):
    torch.manual_seed(0)
    network = LKDN(num_feat=24, num_atten=24, num_block=2, num_in=2, upscale=2)
    torch.save({'params': network.state_dict()}, tmp_path / 'lkdn.pth')
    folders = list(map(str, camera(4)))
    return [
        *(str(tmp_path / 'lkdn.pth'), '--pairs', *folders, '--test', *folders, '-o', str(tmp_path / 'runs.jsonl')),
        *('--held', '1', '--iterations', '2', '--batch', '1', '--side', '16', '--measured-side', '24'),
    ]


@pytest.fixture
def study(script, call, monkeypatch):
    found = []
    monkeypatch.setattr(script, 'study', lambda arguments: found.append(script.Study(arguments)))
    monkeypatch.setattr(sys, 'argv', ['adaptation_study.py', *call])
    script.main()
    return found[0]


def test_each_way_begins_at_the_network(script, study):
    image = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    sizes = {}
    with torch.no_grad():
        expected = study.network(image)
    for name, method in script.METHODS.items():
        if not method.rank:
            continue
        network = deepcopy(study.network)
        groups = study.prepare(network, method)
        with torch.no_grad():
            assert (network(image) - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        assert [factor for _, factor in groups] == [1, method.b_rate, 1], name
        scales = [layer.lora_alpha / layer.rank for layer in network.modules() if hasattr(layer, 'lora_A')]
        assert torch.allclose(torch.stack(scales), torch.tensor(method.strength)), name
        sizes[name] = sum(value.numel() for values, _ in groups for value in values)
        assert sizes[name] == sum(value.numel() for value in network.parameters() if value.requires_grad), name
    equal = sizes['rank 2, biases, norms']
    for name, size in sizes.items():
        if name.startswith('ranks by'):
            assert 0.9 * equal < size <= equal, name
        elif name.startswith('rank 2, biases, norms, ') and 'depth-wise' not in name:
            assert size == equal, name


def test_what_is_studied_is_how_adapt_trains(script):
    values = {'network': 'LKDN', 'scale': 2, 'base': {}, 'lora': {}, 'pretrain': None, 'imports': [], 'side': 32}
    values |= {'batch': 4, 'workers': 0, 'amp': None, 'ema_decay': adapting.EMA, 'rate': 1e-3, 'iterations': 100}
    options = yaml.safe_load(option_text(**values, minutes=1, validations=4))
    method, train, data = script.Method(), options['train'], options['datasets']['train']
    assert train['pixel_opt']['type'] == {'mse': 'MSELoss', 'l1': 'L1Loss'}[method.loss]
    assert data['use_hflip'] == data['use_rot'] == method.augments
    assert train['ema_decay'] == script.EMA and train['scheduler']['type'].startswith('Cosine')
    assert options['val']['val_freq'] == 100 // 4


def test_patches_are_of_one_place_and_turned_if_asked_for(script):
    rows, columns = np.mgrid[:40, :50]
    lr = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    hr = lr.repeat(2, 0).repeat(2, 1)
    for augments in (False, True):
        seen = set()
        patches = script.Patches([(hr, lr)], 16, 4, augments, 0)
        for _, (low, high) in zip(range(10), patches):
            assert torch.equal(high, low.repeat_interleave(2, 2).repeat_interleave(2, 3))
            for patch in (low * 255).round():
                seen.add(tuple(int(one) for one in (patch[:, 0, 1] - patch[:, 0, 0]).flip(0)))  # a step to the right
        assert seen == ({(0, 1, 0)} if not augments else {(0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0)})
        assert len({tuple(low.flatten().tolist()) for _, (low, _) in zip(range(4), patches)}) == 4


def test_its_rates_climb_and_its_runs_are_kept(script, call, tmp_path, monkeypatch, capsys):
    seen = []

    def run(self, name, rate, seed):
        seen.append((name, rate, seed))
        psnr = 30 - abs(rate - 0.002) * 1000 + seed
        return {'method': name, 'rate': rate, 'seed': seed, 'share': 0.1, 'held': psnr, 'test': psnr - 1}

    monkeypatch.setattr(script.Study, 'run', run)
    for _ in range(2):  # a second call finds all of them
        monkeypatch.setattr(sys, 'argv', ['study', *call, '--method', 'rank 2', '--seeds', '2', '--start', '0.0005'])
        script.main()
    assert sorted(rate for _, rate, seed in seen if seed == 0) == [0.0005, 0.001, 0.002, 0.004]
    assert [one for one in seen if one[2]] == [('rank 2', 0.002, 1)]
    assert len((tmp_path / 'runs.jsonl').read_text().splitlines()) == 1 + len(seen)
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['study', '--table', '-o', str(tmp_path / 'runs.jsonl')])
    script.main()
    assert '| rank 2 | 10.0% | 0.002 | 2 | 30.500 ± 0.707 | 29.500 ± 0.707 |' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda call: ['-o', call[8]], 'a checkpoint, --pairs and --test must be given to train.'),
        (lambda call: ['--table', '-o', call[8]], '--output must be a file of runs, got '),
        (lambda call: ['missing.pth', *call[1:]], 'missing.pth cannot be read'),
        (lambda call: [*call, '--bf16'], '--bf16 must be left out here: '),
    ],
)
def test_mistakes_are_told(script, call, monkeypatch, capsys, change, sentence):
    assert call[7] == '-o'
    monkeypatch.setattr(script, 'has_fast_bfloat16', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['study', *change(call)])
    with pytest.raises(SystemExit) as status:
        script.main()
    assert status.value.code == 2 and sentence in capsys.readouterr().err


def test_a_run_trains_and_is_measured(script, study, tmp_path):
    line = study.run('rank 2, biases, norms, PiSSA', 1e-3, 0)
    assert json.loads(json.dumps(line)) == line and line['held'] > 0 and line['test'] > 0 and 0 < line['share'] < 1
    assert study.run('all weights', 1e6, 0)['held'] == -float('inf')  # which diverges
