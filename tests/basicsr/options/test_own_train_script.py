"""The check in somebody's own `train.py`, which imports lora_sr and is BasicSR's otherwise."""

import pytest
from tiny_run import run_python

pytestmark = pytest.mark.slow

SCRIPT = """\
import lora_sr
from basicsr.train import train_pipeline

train_pipeline('.')
"""
WRONG = ['--force_yml', 'scale=3', 'train:optim_g:type=Adamm']
TOLD = (
    'error: network_g.upscale is 2, but scale is 3; they have to be equal\n'
    "error: train.optim_g.type: there is no optimizer 'Adamm'; did you mean Adam"
)


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'train.py').write_text(SCRIPT)
    return 'train.py'


def test_mistakes_are_sentences_and_status_2(tiny_options, tmp_path, script, monkeypatch):
    done = run_python(script, '-opt', 'tiny.yml', *WRONG, cwd=tmp_path, status=2)
    assert done.stderr.startswith(TOLD) and 'Traceback' not in done.stderr
    assert not (tmp_path / 'experiments').exists()
    done = run_python(script, '-opt', 'tiny.yml', '--force_yml', 'totl=1', cwd=tmp_path, status=2)
    assert done.stderr.startswith("error: --force_yml totl=1: the option file has no key 'totl'; ")

    monkeypatch.setenv('LOCAL_RANK', '1')
    assert run_python(script, '-opt', 'tiny.yml', *WRONG, cwd=tmp_path, status=2).stderr == ''
    monkeypatch.setenv('LORA_SR_CHECK', '0')
    done = run_python(script, '-opt', 'tiny.yml', *WRONG, cwd=tmp_path, status=1)
    assert 'Traceback' in done.stderr and 'error: network_g' not in done.stderr


def test_correct_file_trains(tiny_options, tmp_path, script):
    run_python(script, '-opt', 'tiny.yml', '--force_yml', 'train:total_iter=2', cwd=tmp_path)
    assert (tmp_path / 'experiments/tiny/models/net_g_2.pth').exists()
