"""Curves of training runs: against the networks that the runs saved."""

import math
import os

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from tiny_run import TINY_OPTIONS, run_python, write_pairs

from lora_sr.cli.main import main
from lora_sr.errors import InputError, printable
from lora_sr.report.curves import plot_curves, read_curves


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp('curves')
    write_pairs(root)
    text = TINY_OPTIONS.format(root=root, backend='disk', suffix='')
    (root / 'tiny.yml').write_text(text.replace('val_freq: 4', 'val_freq: 2'))
    run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', cwd=root)
    return root


def psnr_of_checkpoint(root, iteration):
    network = build_network({'type': 'MSRResNet', 'num_feat': 4, 'num_block': 1, 'upscale': 2})
    network.load_state_dict(torch.load(root / f'experiments/tiny/models/net_g_{iteration}.pth')['params'])
    values = []
    for path in sorted((root / 'lq').iterdir()):
        image = cv2.imread(str(path)).astype(np.float32) / 255
        with torch.no_grad():
            output = network(torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)[None])[0]
        output = (output.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()[:, :, ::-1]
        values.append(calculate_psnr(output, cv2.imread(str(root / 'gt' / path.name)), crop_border=2))
    return np.mean(values)


@pytest.mark.parametrize(
    'text',
    [
        'total_iter: abc',
        'total_iter: nan',
        'total_iter: inf',
        'total_iter: 1e999',
        'iter: ,',
        f'iter: {"9" * 5000}',
        'iter: ²',
    ],
)
def test_a_log_may_say_anything(tmp_path, text):
    run = write_log(tmp_path, [(100, 'A', '1.0')])
    (log,) = run.glob('train_*.log')
    before = read_curves(run)
    log.write_text(f'{log.read_text()}\n  {text}\n')
    assert read_curves(run) == before == {'A': {100: 1.0}}


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'lost', 'loop'])
def test_what_is_no_log(tmp_path, kind):
    log = tmp_path / 'train_x.log'
    {'folder': log.mkdir, 'pipe': lambda: os.mkfifo(log), 'lost': lambda: log.symlink_to('nowhere')}.get(
        kind, lambda: log.symlink_to(log.name)
    )()
    with pytest.raises(InputError, match='log .*train_x.log cannot be read'):
        read_curves(tmp_path)


@pytest.mark.parametrize('name', ['_run', '$x^2$', 'a$b', '$', '\x1b[31m', r'\$x$'])
def test_names_stand_in_the_legend_as_they_are(tmp_path, name, recwarn):
    pytest.importorskip('matplotlib')
    figure = plot_curves({name: write_log(tmp_path, [(100, '_$A$', '1.0')])})
    figure.savefig(tmp_path / 'figure.svg', metadata={'Date': None})
    (axes,) = figure.axes
    (text,) = axes.get_legend().get_texts()
    shown = [one._preprocess_math(one.get_text()) for one in (text, axes.title)]
    assert shown == [(shown[0][0], False), (' _$A$', False)]
    assert shown[0][0].strip() == printable(name) and not recwarn.list


@pytest.mark.slow
def test_values_are_those_of_the_saved_networks(trained):
    curves = read_curves(trained / 'experiments' / 'tiny')
    assert list(curves) == ['val'] and list(curves['val']) == [2, 4, 6]
    for iteration, value in curves['val'].items():
        assert value == pytest.approx(psnr_of_checkpoint(trained, iteration), abs=1e-4)


def write_log(run, validations, date='20240101_000000', metric='psnr'):
    """A log as BasicSR writes it, of (iteration, set, value as text)."""
    run.mkdir(exist_ok=True)
    lines = []
    for iteration, dataset, value in validations:
        lines += [
            f'2024-01-01 00:00:00,000 INFO: [tiny..][epoch:  0, iter:{iteration:8,d}, lr:(1.000e-03,)] l_pix: 1.0e-01 ',
            f'2024-01-01 00:00:00,000 INFO: Validation {dataset}',
            f'\t # {metric}: {value}\tBest: 99.0000 @ 1 iter',
            '\t # other: 0.5000\tBest: 0.5000 @ 1 iter',
            '',
        ]
    (run / f'train_tiny_{date}.log').write_text('\n'.join(lines))
    return run


def test_a_resumed_run_has_two_logs_and_the_later_counts(tmp_path):
    run = write_log(tmp_path / 'run', [(1000, 'A', '1.0'), (2000, 'A', '2.0'), (3000, 'A', '3.0')])
    write_log(run, [(3000, 'A', '3.5'), (4000, 'A', '4.0')], date='20240102_000000')
    assert read_curves(run) == {'A': {1000: 1.0, 2000: 2.0, 3000: 3.5, 4000: 4.0}}


def test_what_a_resumption_left_behind_does_not_count(tmp_path):
    run = write_log(tmp_path / 'run', [(1000, 'A', '1.0'), (2000, 'A', '2.0'), (3000, 'A', '3.0')])
    log = write_log(run, [(2500, 'A', '2.5')], date='20240102_000000') / 'train_tiny_20240102_000000.log'
    resumption = '2024-01-02 00:00:00,000 INFO: Resuming training from epoch: 1, iter: 1500.\n'
    log.write_text(resumption + log.read_text())
    assert read_curves(run) == {'A': {1000: 1.0, 2500: 2.5}}


def test_logs_are_in_the_order_of_their_times(tmp_path):
    """Not of their names, which a run that was copied under another has changed."""
    for name, day, value in (('z', '20260101', '1.0'), ('a', '20260102', '2.0')):
        other = write_log(tmp_path / name, [(100, 'A', value)])
        (log,) = other.glob('train_*.log')
        log.rename(tmp_path / f'train_{name}_{day}_000000.log')
    assert read_curves(tmp_path) == {'A': {100: 2.0}}


def test_the_last_validation_is_of_the_last_iteration(tmp_path):
    run = write_log(tmp_path / 'run', [(1000, 'A', '1.0')])
    (log,) = run.glob('train_*.log')
    end = '2024-01-01 00:00:00,000 INFO: End of training. Time consumed: 0:00:01\n'
    last = '2024-01-01 00:00:00,000 INFO: Validation A\n\t # psnr: 1.5\tBest: 1.5 @ 1250 iter\n'
    log.write_text('    total_iter: 1250\n' + log.read_text() + end + last)
    assert read_curves(run) == {'A': {1000: 1.0, 1250: 1.5}}


def test_validations_between_logged_iterations_are_refused(tmp_path):
    run = write_log(tmp_path / 'run', [(1000, 'A', '1.0')])
    (log,) = run.glob('train_*.log')
    iteration, validation = log.read_text().split('\n', 1)
    log.write_text('\n'.join([iteration, validation, validation]))
    with pytest.raises(InputError, match='val.val_freq should be a multiple of logger.print_freq'):
        read_curves(run)


def test_any_name_and_any_value_is_read(tmp_path):
    validations = [(1, 'Set 5', 'inf'), (2, 'Set 5', '-1.5000'), (2, 'val', 'nan')]
    curves = read_curves(write_log(tmp_path / 'run', validations, metric='psnr-y (dB)'), 'psnr-y (dB)')
    assert list(curves) == ['Set 5', 'val'] and curves['Set 5'] == {1: math.inf, 2: -1.5}
    assert math.isnan(curves['val'][2])
    with pytest.raises(InputError, match=r'has no "psnr": it has other, psnr-y \(dB\)\.'):
        read_curves(tmp_path / 'run')


def test_a_panel_for_each_set_and_a_line_for_each_run(tmp_path):
    pytest.importorskip('matplotlib')
    one = write_log(tmp_path / 'one', [(100, 'A', '1.0'), (100, 'B', '5.0'), (200, 'A', '2.0')])
    two = write_log(tmp_path / 'two', [(50, 'A', '3.0')])

    def content(*arguments):
        figure = plot_curves({'first': one, 'second': two}, *arguments)
        return {
            axes.get_title(): {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.get_lines()}
            for axes in figure.axes
        }

    panel_b = {'first': (100, 5.0)}
    assert content() == {'A': {'first': (100, 200, 1.0, 2.0), 'second': (50, 3.0)}, 'B': panel_b}
    assert content(['B']) == {'B': panel_b}
    assert content(['B'], 'other') == {'B': {'first': (100, 0.5)}}


@pytest.mark.slow
def test_the_picture_is_written(trained, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'curves.png'
    assert main(['curves', f'one={trained}/experiments/tiny', '-o', str(picture)]) == 0
    assert cv2.imread(str(picture)) is not None and capsys.readouterr().out == f'wrote {picture}\n'


@pytest.mark.parametrize('command', [['curves', '-o', 'a.png'], ['compare', '--set', 'A=images']])
def test_a_name_is_given_once(command, capsys):
    assert main([*command, 'a=X', 'b=Y', 'a=Z']) == 2
    assert capsys.readouterr().err == 'lora-sr: error: The name "a" is given 2 times: give each its own.\n'


@pytest.mark.parametrize('argument', ['X', '=X', 'a='])
def test_an_argument_needs_a_name(argument, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['curves', argument, '-o', 'a.png'])
    assert f"'{argument}' should be NAME=FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_wrong_input_is_one_sentence(trained, tmp_path, capsys):
    with pytest.raises(InputError, match='has no training log'):
        read_curves(tmp_path)
    with pytest.raises(InputError, match='has no "ssim": it has psnr'):
        read_curves(trained / 'experiments' / 'tiny', 'ssim')
    pytest.importorskip('matplotlib')
    for arguments in (['--dataset', 'Set5', '-o', 'a.png'], ['-o', 'a.xyz'], ['-o', str(tmp_path / 'no' / 'a.png')]):
        assert main(['curves', f'one={trained}/experiments/tiny', *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_picture_that_exists_is_kept(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    write_log(tmp_path / 'run', [(4, 'val', '30.0000')])
    (tmp_path / 'c.png').write_text('mine')
    command = ['curves', f'a={tmp_path / "run"}', '-o', str(tmp_path / 'c.png')]
    assert main(command) == 2 and (tmp_path / 'c.png').read_text() == 'mine'
    assert 'c.png exists: choose another name, or allow it with --overwrite' in capsys.readouterr().err
    assert main([*command, '--overwrite']) == 0 and cv2.imread(str(tmp_path / 'c.png')) is not None
