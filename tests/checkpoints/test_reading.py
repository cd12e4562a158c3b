"""A file of weights is read once by each command, and by a run."""

import json

import cv2
import numpy as np
import pytest
import safetensors
import torch
import yaml
from tiny_run import TINY_OPTIONS, run_python, write_pairs

from lora_sr.adapters import LoRAConfig, add_lora, save_adapter
from lora_sr.archs import SPAN, DSCLoRA
from lora_sr.checkpoints import Checkpoint, content
from lora_sr.cli.main import main
from lora_sr.errors import InputError

# Runs what follows and prints how often the files whose names end in .pth were opened for reading.
COUNTING = """
import collections, json, os, sys
opened = collections.Counter()
def count(event, arguments):
    if event == 'open' and str(arguments[0]).endswith('.pth') and set(arguments[1] or 'r') <= set('rb'):
        opened[os.path.basename(str(arguments[0]))] += 1
sys.addaudithook(count)
program, sys.argv = sys.argv[1], sys.argv[1:]
try:
    if program == 'train':
        sys.argv[0] = 'train.py'
        from lora_sr.cli.main import run_pipeline
        status = run_pipeline(is_train=True)
    else:
        from lora_sr.cli.main import main
        status = main(sys.argv)
finally:
    print('OPENED', json.dumps(opened))
sys.exit(status)
"""


def opened(folder, *arguments) -> dict:
    done = run_python('-c', COUNTING, *arguments, cwd=folder)
    return json.loads(done.stdout.split('OPENED')[1])


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    torch.save({'params': DSCLoRA(feature_channels=4, upscale=4).state_dict()}, tmp_path / 'adapted.pth')
    torch.save({'params': SPAN(feature_channels=4, upscale=4, deploy=True).state_dict()}, tmp_path / 'plain.pth')
    cv2.imwrite(str(tmp_path / 'small.png'), np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    'command',
    [
        'upscale small.png -m FILE -o large.png',
        'inspect FILE',
        'compare net=FILE',
        'submission -m FILE --team 3 --name Mine -o handed',
        'export torchscript FILE -o net.pt',
        'merge adapted.pth -o merged.safetensors',
        'adapter extract adapted.pth -o adapter.safetensors',
    ],
)
def test_once_by_a_command(folder, command):
    file = 'plain.pth' if 'FILE' in command else 'adapted.pth'
    found = opened(folder, *command.replace('FILE', file).split())
    assert found[file] == 1


@pytest.mark.slow
def test_once_by_a_run_with_ema(tmp_path):
    write_pairs(tmp_path / 'pairs')
    options = yaml.safe_load(TINY_OPTIONS.format(root=tmp_path / 'pairs', suffix='', backend='disk'))
    options.update(model_type='DistillationModel', val=None)
    options['datasets'].pop('val')
    options['network_g'] = {'type': 'DSCLoRA', 'feature_channels': 4, 'upscale': 2, 'rank': 2}
    options['network_t'] = {'type': 'SPAN', 'feature_channels': 4, 'upscale': 2}
    options['path'].update(pretrain_network_g='base.pth', pretrain_network_t='teacher.pth')
    options['train'].update(ema_decay=0.9, total_iter=2, distill_pixel_opt={'type': 'L1Loss'})
    (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(options))
    for name in ('base', 'teacher'):
        network = SPAN(feature_channels=4, upscale=2, deploy=name == 'base')
        torch.save({'params': network.state_dict()}, tmp_path / f'{name}.pth')
    assert opened(tmp_path, 'train', '-opt', 'tiny.yml') == {'base.pth': 1, 'teacher.pth': 1}

    # The same under BasicSR's own model.
    options.update(model_type='SRModel')
    for section, keys in ((options, ('network_t',)), (options['path'], ('pretrain_network_t',))):
        for key in keys:
            del section[key]
    del options['train']['distill_pixel_opt']
    (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(dict(options, name='stock')))
    assert opened(tmp_path, 'train', '-opt', 'tiny.yml')['base.pth'] == 1


def test_what_is_remembered_is_forgotten(folder):
    content.remember()
    try:
        first = content.read_checkpoint(folder / 'plain.pth')
        assert content.read_checkpoint(folder / 'plain.pth') is first
        torch.save({'params': {'a': torch.zeros(1)}}, folder / 'plain.pth')  # another file of that name
        assert list(content.read_checkpoint(folder / 'plain.pth')['params']) == ['a']
    finally:
        content.forget()
    again = content.read_checkpoint(folder / 'plain.pth')
    assert again is not content.read_checkpoint(folder / 'plain.pth')


def test_metadata_and_form(folder):
    network = add_lora(SPAN(feature_channels=4, deploy=True), LoRAConfig(['conv_cat'], rank=2))
    save_adapter(network, folder / 'a.safetensors')
    adapter = Checkpoint.read(folder / 'a.safetensors')
    with safetensors.safe_open(folder / 'a.safetensors', 'pt') as file:
        assert adapter.content.metadata == file.metadata()
    assert adapter.form == 'adapter' and adapter.family is None
    adapted = Checkpoint.read(folder / 'adapted.pth')
    assert (adapted.form, adapted.family, adapted.param_key) == ('adapted', 'DSCLoRA', 'params')
    assert Checkpoint.read(folder / 'plain.pth').form == 'base'
    with pytest.raises(InputError, match='has no "ema": it has params'):
        Checkpoint.read(folder / 'plain.pth', 'ema')


def test_the_average_comes_first_whichever_way_a_file_is_named(folder, capsys):
    """By its path, and by an option file: `compare` measures the same weights."""
    weak, good = (SPAN(feature_channels=4, upscale=2, deploy=True) for _ in range(2))
    torch.save({'params': weak.state_dict(), 'params_ema': good.state_dict()}, folder / 'both.pth')
    section = 'network_g: {type: SPAN, feature_channels: 4, upscale: 2, deploy: true}\n'
    (folder / 'both.yml').write_text(f'{section}path: {{pretrain_network_g: {folder / "both.pth"}}}\n')
    small = folder / 'hr'
    small.mkdir()
    cv2.imwrite(str(small / 'a.png'), np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    table = folder / 'table.json'
    names = [f'file={folder / "both.pth"}', f'options={folder / "both.yml"}']
    assert main(['compare', *names, '--set', f'set={small}', '-o', str(table)]) == 0
    torch.save({'params': good.state_dict()}, folder / 'good.pth')
    quality = {row['name']: row for row in json.loads(table.read_text())['methods']}
    assert (
        main(['compare', f'good={folder / "good.pth"}', '--set', f'set={small}', '-o', str(folder / 'good.json')]) == 0
    )
    expected = json.loads((folder / 'good.json').read_text())['methods'][-1]
    for name in ('file', 'options'):
        assert {**quality[name], 'name': 'good'} == expected
