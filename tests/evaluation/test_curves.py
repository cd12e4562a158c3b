"""Curves of training runs: against the networks that the runs saved."""

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr
from tiny_run import TINY_OPTIONS, run_python, write_pairs

from lora_sr.cli.main import main
from lora_sr.errors import InputError
from lora_sr.evaluation.curves import read_curves


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


def test_values_are_those_of_the_saved_networks(trained):
    curves = read_curves(trained / 'experiments' / 'tiny')
    assert list(curves) == ['val'] and list(curves['val']) == [2, 4, 6]
    for iteration, value in curves['val'].items():
        assert value == pytest.approx(psnr_of_checkpoint(trained, iteration), abs=1e-4)


def test_the_picture_is_written(trained, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'curves.png'
    assert main(['curves', f'one={trained}/experiments/tiny', '-o', str(picture)]) == 0
    image = cv2.imread(str(picture))
    assert image.std() > 0


def test_wrong_input_is_one_sentence(trained, tmp_path, capsys):
    with pytest.raises(InputError, match='has no training log'):
        read_curves(tmp_path)
    with pytest.raises(InputError, match='have no "ssim": it has psnr'):
        read_curves(trained / 'experiments' / 'tiny', 'ssim')
    pytest.importorskip('matplotlib')
    for arguments in (['--dataset', 'Set5', '-o', 'a.png'], ['-o', 'a.xyz'], ['-o', str(tmp_path / 'no' / 'a.png')]):
        assert main(['curves', f'one={trained}/experiments/tiny', *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
