"""The pipelines from the command line: a run and its resumption, two processes, and mistakes without a traceback."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.utils import options as basicsr_options
from tiny_run import TINY_OPTIONS, logged, python_environment, run_python, write_pairs

from lora_sr.basicsr import options, provenance, signals
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.cli import pipelines
from lora_sr.cli.pipelines import add_parser, main
from lora_sr.option_file import load_options


def listing(folder: Path) -> list:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob('*'))


@pytest.mark.slow
def test_run_and_resume(tiny_options, tmp_path):
    """A run that stops and goes on has the learning rates and the weights of one that never stopped."""
    command = ['-m', 'lora_sr.train', '-opt', tiny_options]
    whole = run_python(*command, '--force_yml', 'name=whole', cwd=tmp_path)
    assert logged(whole) == {1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 5e-4, 5: 5e-4, 6: 2.5e-4}

    run_python(*command, '--force_yml', 'train:total_iter=2', cwd=tmp_path)
    rest = run_python(*command, '--auto_resume', cwd=tmp_path)
    assert logged(rest) == {iteration: rate for iteration, rate in logged(whole).items() if iteration > 2}
    models = tmp_path / 'experiments/tiny/models'
    assert sorted(os.listdir(models)) == ['net_g_2.pth', 'net_g_4.pth', 'net_g_6.pth', 'net_g_latest.pth']
    assert os.listdir(models.parents[1]) and not list(tmp_path.rglob('*.tmp'))
    first = read_checkpoint(models / 'net_g_2.pth')['params']
    other = read_checkpoint(tmp_path / 'experiments/whole/models/net_g_2.pth')['params']
    assert all(torch.equal(first[key], other[key]) for key in first)

    test = tmp_path / 'test.yml'
    text = tiny_options.read_text()
    text = text[: text.index('  train:\n')] + text[text.index('  val:\n') :].replace('  val:\n', '  test:\n', 1)
    test.write_text(text.replace('pretrain_network_g: ~', f'pretrain_network_g: {models / "net_g_6.pth"}'))
    done = run_python('-m', 'lora_sr.test', '-opt', test, cwd=tmp_path)
    assert re.search(r'# psnr: \d+\.\d{4}', done.stderr)


@pytest.mark.slow
def test_a_run_that_starts_from_the_last_one_of_its_name(tiny_options, pairs, tmp_path):
    """BasicSR moves that one away first; and its loader takes paths as they stand."""
    command = ['-m', 'lora_sr.train', '-opt', tiny_options]
    run_python(*command, cwd=tmp_path)
    first = read_checkpoint(tmp_path / 'experiments/tiny/models/net_g_6.pth')
    torch.save({'state_dict': first['params']}, tmp_path / 'experiments/tiny/wrapped.pth')
    options = load_options(tiny_options)
    (tmp_path / 'names.txt').write_text(''.join(f'{index:03}.png (32,32,3)\n' for index in range(8)))
    options['datasets']['train'].update(dataroot_gt=f'{pairs}/gt/', meta_info_file='~/names.txt')
    options['datasets']['val'].update(
        dataroot_gt=f'{pairs}/gt.lmdb/', dataroot_lq=f'{pairs}/lq.lmdb//', io_backend={'type': 'lmdb'}
    )
    options['path'].update(pretrain_network_g='experiments/tiny/wrapped.pth', param_key_g='state_dict')
    options['train'].update(ema_decay=0.9, total_iter=1)
    options['train']['optim_g'].update(lr=1e-9, weight_decay=0)
    tiny_options.write_text(yaml.safe_dump(json.loads(json.dumps(options))))
    done = subprocess.run(
        [sys.executable, *map(str, command), '--local-rank=0'],
        cwd=tmp_path,
        env={**python_environment(), 'HOME': str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'experiments').glob('tiny_archived_*'))) == 1
    second = read_checkpoint(tmp_path / 'experiments/tiny/models/net_g_latest.pth')
    for key in ('params', 'params_ema'):
        for name, value in first['params'].items():
            torch.testing.assert_close(second[key][name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize('saved', [[], [4, 12]])
def test_interrupted(tiny_options, tmp_path, monkeypatch, capfd, saved):
    """What is promised is there."""
    monkeypatch.chdir(tmp_path)
    for iteration in saved:
        (tmp_path / f'experiments/tiny/training_states/{iteration}.state').parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f'experiments/tiny/training_states/{iteration}.state').touch()

    def train(root):
        provenance.begin(str(tiny_options), load_options(tiny_options), None)
        raise KeyboardInterrupt

    monkeypatch.setattr('lora_sr.basicsr.pipelines.train_pipeline', train)
    assert main(True, ['-opt', 'tiny.yml']) == 130
    hint = '; --auto_resume goes on from iteration 12' if saved else ''
    assert capfd.readouterr().err == f'interrupted{hint}\n'


@pytest.mark.slow
def test_two_processes_on_the_cpu(tiny_options, tmp_path):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2]
    command = ['-m', 'lora_sr.train', '--launcher', 'pytorch', '-opt', tiny_options]
    done = run_python(*launcher, *command, cwd=tmp_path)
    assert 'World size (gpu number): 2' in done.stderr
    assert 'DistributedDataParallel - MSRResNet' in done.stderr
    assert sorted(logged(done)) == [1, 2, 3, 4, 5, 6]

    wrong = run_python(*launcher, *command, '--force_yml', 'scale=3', 'name=wrong', cwd=tmp_path, status=1)
    assert wrong.stderr.count('error: network_g.upscale is 2, but scale is 3; they have to be equal\n') == 1
    assert not (tmp_path / 'experiments/wrong').exists()


@pytest.mark.slow
def test_two_processes_adapt_a_network(tiny_options, tmp_path):
    base = MSRResNet(num_feat=4, num_block=1, upscale=2)
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    text = tiny_options.read_text()
    start, end = text.index('network_g:'), text.index('path:')
    section = '{type: MSRResNet, num_feat: 4, num_block: 1, upscale: 2}'
    lora = '{groups: [all], rank: 2, also_train: [bias]}'
    text = f'{text[:start]}network_g: {{type: AdaptSR, base: {section}, lora: {lora}}}\n{text[end:]}'
    tiny_options.write_text(text.replace('pretrain_network_g: ~', f'pretrain_network_g: {tmp_path}/base.pth'))
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2]
    run_python(*launcher, '-m', 'lora_sr.train', '--launcher', 'pytorch', '-opt', tiny_options, cwd=tmp_path)
    adapted = read_checkpoint(tmp_path / 'experiments/tiny/models/net_g_6.pth')['params']
    assert all(torch.equal(adapted[key], value) for key, value in base.state_dict().items())
    updates = [value for key, value in adapted.items() if key.endswith('lora_B') or '.lora_shift_' in key]
    assert updates and all(value.any() for value in updates)


MISTAKES = [
    ('network_g:type=MSRResnet', "network_g.type: there is no network 'MSRResnet'; did you mean MSRResNet?"),
    ('network_g:upscale=4', 'network_g.upscale is 4, but scale is 2; they have to be equal'),
    ('model_type=SrModel', "model_type: there is no model 'SrModel'; did you mean SRModel"),
    ('train:optim_g:type=Adamm', "train.optim_g.type: there is no optimizer 'Adamm'; did you mean Adam"),
    ('train:scheduler:type=Cosine', "train.scheduler.type: there is no scheduler 'Cosine'; "),
    ('train:pixel_opt:type=L3Loss', "train.pixel_opt.type: there is no loss 'L3Loss'; did you mean"),
    ('train:total_iter=many', "train.total_iter has to be a whole number of at least 1, not 'many'"),
    ('datasets:train:dataroot_gt=nowhere', 'datasets.train.dataroot_gt: nowhere does not exist'),
    ('path:pretrain_network_g=no.pth', 'path.pretrain_network_g: the checkpoint no.pth cannot be read: No such file'),
    ('path:resume_state=tiny.yml', 'path.resume_state: tiny.yml is an option file, where a checkpoint is right'),
    ('train:totl_iter=5', "--force_yml train:totl_iter=5: 'train' has no key 'totl_iter'; the keys there are optim_g,"),
    ('train:total_iter', "--force_yml train:total_iter: there is no '='"),
    ('name=[1', '--force_yml name=[1: did not find expected'),
]


@pytest.mark.parametrize(('entry', 'sentence'), MISTAKES)
def test_mistakes(tiny_options, tmp_path, monkeypatch, capfd, entry, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(True, ['-opt', 'tiny.yml', '--force_yml', entry]) == 2
    told = capfd.readouterr()
    assert told.out == ''
    assert told.err.startswith(f'error: {sentence}')
    assert told.err.count('\n') == 1
    assert listing(tmp_path) == ['tiny.yml']


def test_a_start_that_the_run_does_not_know_of(tiny_options, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert main(True, ['-opt', 'tiny.yml']) == 2
    assert capfd.readouterr().err.startswith('error: --launcher must be pytorch where torchrun starts 4 processes')
    monkeypatch.delenv('WORLD_SIZE')
    assert main(True, ['-opt', 'tiny.yml', '--launcher=pytorch']) == 2
    assert capfd.readouterr().err.startswith('error: --launcher pytorch needs a start by torchrun')
    assert listing(tmp_path) == ['tiny.yml']


def test_an_error_after_a_signal_is_one(tiny_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(root):
        signals.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError('Connection closed by peer')

    monkeypatch.setattr('lora_sr.basicsr.pipelines.train_pipeline', train)
    with pytest.raises(RuntimeError, match='closed by peer'):
        main(True, ['-opt', 'tiny.yml'])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_commands_of_lora_sr(tiny_options, tmp_path, monkeypatch, capfd):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(pipelines, 'main', lambda is_train, argv: seen.append((is_train, argv)) or 0)
    for command in ('train', 'test'):
        args = parser.parse_args([command, '-opt', 'a.yml', '--auto_resume', '--force_yml', 'a=1', 'b=2'])
        args.run(args)
    argv = ['-opt', 'a.yml', '--launcher', 'none', '--local_rank', '0', '--auto_resume', '--force_yml', 'a=1', 'b=2']
    assert seen == [(True, argv), (False, argv)]

    monkeypatch.setattr(pipelines, 'main', main)
    args = parser.parse_args(['train', '-opt', 'tiny.yml', '--force_yml', 'num_gpu=many'])
    with pytest.raises(SystemExit, match='2'):
        args.run(args)
    assert capfd.readouterr().err == "error: num_gpu has to be a whole number of at least 0, not 'many'\n"


def test_several_mistakes(tiny_options, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    argv = ['-opt', 'tiny.yml', '--force_yml', 'train:optim_g:type=Adamm', 'val:val_freq=0', 'logger:print_freq=0']
    assert main(True, argv) == 2
    assert [line.split(' ')[1].rstrip(':') for line in capfd.readouterr().err.splitlines()] == [
        'train.optim_g.type',
        'logger.print_freq',
        'val.val_freq',
    ]
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert main(True, argv) == 2
    assert capfd.readouterr().err == ''  # the first process of each machine tells them


def test_wrong_files(tiny_options, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.yml').write_text("name: x\nbad: !!python/object/apply:os.system ['touch ran']\n")
    assert main(True, ['-opt', 'bad.yml']) == 2
    assert main(True, ['-opt', 'none.yml']) == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: the option file bad.yml, line 2: the tag '!!python/object/apply:os.system' is refused, since an option "
        'file holds plain values only',
        'error: the option file none.yml cannot be read: No such file or directory',
    ]
    assert listing(tmp_path) == ['bad.yml', 'tiny.yml']


def test_damaged_database(tmp_path, monkeypatch, capfd):
    write_pairs(tmp_path)
    (tmp_path / 'tiny.yml').write_text(TINY_OPTIONS.format(root=tmp_path, suffix='.lmdb', backend='lmdb'))
    data = tmp_path / 'lq.lmdb' / 'data.mdb'
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    before = listing(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(True, ['-opt', 'tiny.yml']) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(':')[1] for line in lines] == [' datasets.train.dataroot_lq', ' datasets.val.dataroot_lq']
    assert all(f'the database {tmp_path}/lq.lmdb is damaged: data.mdb has' in line for line in lines)
    assert listing(tmp_path) == before


def test_an_output_folder_that_is_a_link_to_nowhere(tiny_options, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'experiments').symlink_to('nowhere')
    assert main(True, ['-opt', str(tiny_options)]) == 2
    error = capfd.readouterr().err
    assert error.startswith('error: the output folder ') and error.endswith('experiments: it is not a folder\n')


def test_output_folder_that_cannot_be_written(tiny_options, tmp_path, capfd, monkeypatch):
    read_only = Path('/proc')
    if not read_only.is_dir():
        pytest.skip('there is no /proc, a folder that nobody can write to')
    monkeypatch.chdir(read_only)
    assert main(True, ['-opt', str(tiny_options)]) == 2
    assert capfd.readouterr().err.startswith('error: the output folder /proc/experiments cannot be written: /proc: ')


def test_lists_of_roots_are_completed(tiny_options, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    write_pairs(home)
    options_of_run = load_options(tiny_options)
    roots = {f'dataroot_{key}': [f'~/{key}.lmdb/', f'{home}/{key}.lmdb'] for key in ('gt', 'lq')}
    section = {**roots, 'io_backend': {'type': 'lmdb'}, 'meta_info_file': [None, '~/names.txt']}
    options_of_run['datasets']['train'].update(section)
    (home / 'names.txt').write_text(''.join(f'{index:03}.png\n' for index in range(8)))
    tiny_options.write_text(yaml.safe_dump(json.loads(json.dumps(options_of_run))))
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(tiny_options)])
    opt, _ = basicsr_options.parse_options(str(tmp_path), is_train=True)
    train = opt['datasets']['train']
    for key in ('gt', 'lq'):
        assert train[f'dataroot_{key}'] == [f'{home}/{key}.lmdb'] * 2
    assert train['meta_info_file'] == [None, f'{home}/names.txt'] and train['phase'] == 'train'


def test_the_check_runs_once(tiny_options, tmp_path, monkeypatch):
    counted, run = [], options.check_options
    monkeypatch.setattr(options, 'check_options', lambda *args: counted.append(args) or run(*args))
    monkeypatch.chdir(tmp_path)
    assert main(True, ['-opt', 'tiny.yml', '--force_yml', 'val:val_freq=0']) == 2
    assert len(counted) == 1
