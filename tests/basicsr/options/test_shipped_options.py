"""The option files that ship: free of mistakes, and good for the published numbers."""

import json
import re

import pytest
from tiny_run import REPOSITORY, run_python

from lora_sr.basicsr.options import check_options
from lora_sr.option_file import apply_overrides, load_options

OPTIONS = REPOSITORY / 'options'


@pytest.mark.parametrize('file', sorted(OPTIONS.rglob('*.yml')), ids=lambda file: file.stem)
def test_nothing_but_the_data_is_missing(file, tmp_path):
    options = load_options(file)
    apply_overrides(options, ['num_gpu=0'])
    problems = check_options(options, 'train' in file.stem, tmp_path)
    absent = r'(dataroot_\w+|pretrain_network_\w).*(does not exist|No such file)|perceptual_opt needs'
    missing = [problem for problem in problems if re.search(absent, problem)]
    assert problems == missing


PLAIN = ['path:param_key_g=~']  # the file is a plain state dict


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'option_file', 'overrides'),
    [
        ('spantiny_ch26_x4', 'SPAN/test_SPAN_x4', ['network_g:feature_channels=26', *PLAIN]),
        ('span_ch28_x4', 'SPAN/test_SPAN_x4', ['network_g:feature_channels=28', *PLAIN]),
        ('DSCF_ch26_x4', 'SPAN/test_SPAN_x4', ['network_g:feature_channels=26', *PLAIN]),
        ('LKDN_x4', 'LKDN/test_LKDN_x4', []),
        ('LKDN-S_x4', 'LKDN/test_LKDN-S_x4', []),
        ('LKDN-S_del_rep_x4', 'LKDN/test_LKDN-S_deploy_x4', PLAIN),
    ],
)
def test_official_weights_have_the_psnr_and_ssim_of_their_code(shared, tmp_path, name, option_file, overrides):
    expected = json.loads((shared / 'reference.json').read_text())['measured_with_official_code'][name]
    (tmp_path / 'datasets').mkdir()
    (tmp_path / 'datasets' / 'benchmark').symlink_to(shared / 'data' / 'benchmark')
    overrides = [
        *overrides,
        f'path:pretrain_network_g={shared / expected["weights"]}',
        'val:save_img=false',
        'num_gpu=0',
    ]
    option_file = OPTIONS / 'test' / f'{option_file}.yml'
    done = run_python('-m', 'lora_sr.test', '-opt', option_file, '--force_yml', *overrides, cwd=tmp_path)
    found = re.findall(r'Validation (\w+)\n\t # psnr: ([\d.]+).*\n\t # ssim: ([\d.]+)', done.stderr)
    assert [row[0] for row in found] == ['Set5', 'Set14', 'B100']
    for dataset, psnr, ssim in found:
        assert float(psnr) == pytest.approx(expected[dataset]['psnr'], abs=0.005)
        assert float(ssim) == pytest.approx(expected[dataset]['ssim'], abs=0.0002)
