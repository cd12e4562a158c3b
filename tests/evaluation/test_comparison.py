"""The table of `lora-sr compare`, against published numbers and BasicSR's own metrics."""

import json
import re

import cv2
import pytest
import torch

from lora_sr.archs.span_arch import SPAN
from lora_sr.cli.main import main
from lora_sr.evaluation.comparison import compare, format_table


def test_rows_are_the_published_numbers(shared, tmp_path):
    content = json.loads((shared / 'reference.json').read_text())
    reference = content['measured_with_official_code']['DSCF_ch26_x4']
    data = shared / 'data' / 'benchmark' / 'Set5'
    checkpoints = {'DSCF': shared / reference['weights']}
    bicubic, network = compare(data / 'GTmod4', 4, checkpoints, data / 'LRbicx4', tmp_path / 'details.png')
    assert network.psnr == pytest.approx(reference['Set5']['psnr'], abs=0.005)
    assert network.ssim == pytest.approx(reference['Set5']['ssim'], abs=0.0002)
    assert network.parameters == reference['params']
    # The papers' tables have 28.42 dB and 0.8104 for MATLAB's bicubic, computed without rounding it to 8 bits.
    assert bicubic.psnr == pytest.approx(28.42, abs=0.02) and bicubic.ssim == pytest.approx(0.8104, abs=0.001)
    # 720p is 320x180 pixels of LR, the challenge's FLOPs (which are multiply-adds) are of 256x256.
    challenge = content['published']['NTIRE efficient SR']['2025']['23_DSCF (1st)']['flops_g']
    assert network.multi_adds / 1e9 == pytest.approx(challenge * (320 * 180) / 256**2, abs=0.005)
    header, first, second = format_table([bicubic, network]).splitlines()
    assert re.split(r' {2,}', header.strip()) == ['parameters', 'multi-adds (720p), G', 'PSNR (Y), dB', 'SSIM (Y)']
    assert first.split()[:3] == ['bicubic', '-', '-'] and second.split()[:3] == ['DSCF', '130,828', '7.50']
    assert len(header) == len(first) == len(second)
    picture = cv2.imread(str(tmp_path / 'details.png'))
    assert picture.shape == (5 * (24 + 192 + 4), 3 * (192 + 4), 3)


def test_wrong_scale_and_names_are_one_sentence(tmp_path, capsys):
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images' / 'a.png'), torch.randint(0, 256, (17, 20, 3), dtype=torch.uint8).numpy())
    torch.save(SPAN(feature_channels=6, upscale=3).state_dict(), tmp_path / 'net.pth')
    arguments = ['compare', f'mine={tmp_path / "net.pth"}', '--gt', str(tmp_path / 'images')]
    assert main([*arguments, '--scale', '2']) == 2
    assert '"mine" makes 30x24 pixels of a.png, where the original has 20x16' in capsys.readouterr().err
    assert main([*arguments, '--scale', '3']) == 0
    assert main([*arguments, '--scale', '0']) == 2
    assert 'The scale is 0' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        main(['compare', 'net.pth', '--gt', str(tmp_path), '--scale', '2'])
    assert 'should be NAME=CHECKPOINT' in capsys.readouterr().err
