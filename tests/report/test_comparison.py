"""`lora-sr compare`, against published numbers, BasicSR's own metrics and networks built without us."""

import csv
import errno
import io
import json
import math
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.ridnet_arch import RIDNet
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from basicsr.metrics import calculate_psnr, calculate_ssim

from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.span import SPAN
from lora_sr.cli.main import main
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.report import comparison as module
from lora_sr.report.comparison import compare
from lora_sr.report.cost import ntire_score
from lora_sr.report.fidelity import Fidelity
from lora_sr.report.plot import plot_comparison
from lora_sr.report.tables import Comparison, Cost, Row, format_csv, format_json, format_markdown, format_table

BASELINES = {
    'EDSR': (EDSR, {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 4}),
    'RCAN': (RCAN, {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 16, 'num_group': 1, 'num_block': 1, 'upscale': 4}),
    'RRDBNet': (RRDBNet, {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4}),
    'MSRResNet': (MSRResNet, {'num_feat': 8, 'num_block': 1, 'upscale': 4}),
    'SwinIR': (
        SwinIR,
        {
            'img_size': 16,
            'window_size': 4,
            'embed_dim': 8,
            'depths': [1],
            'num_heads': [2],
            'upscale': 4,
            'upsampler': 'pixelshuffledirect',
        },
    ),
}


def write_images(folder, sizes, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index, (height, width) in enumerate(sizes):
        image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 2)
        cv2.imwrite(str(folder / f'{index}.png'), cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX))
    return folder


def write_options(path, name, weights=None, **path_keys):
    """An option file of one of BASELINES as a user of BasicSR has it."""
    paths = {'pretrain_network_g': str(weights), **path_keys} if weights else {}
    options = {'name': 'mine', 'scale': 4, 'network_g': {'type': name, **BASELINES[name][1]}, 'path': paths}
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture
def span(tmp_path):
    """A deploy-form SPAN x2 with random weights."""
    torch.manual_seed(0)
    torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), tmp_path / 'span.pth')
    return tmp_path / 'span.pth'


@pytest.mark.parametrize('name', ['DSCF_ch26_x4', 'LKDN-S_x4'])
def test_rows_are_the_published_numbers(shared, tmp_path, name):
    reference = json.loads((shared / 'reference.json').read_text())['measured_with_official_code']
    data = shared / 'data' / 'benchmark' / 'Set5'
    comparison = compare(
        {'network': shared / reference[name]['weights']},
        {'Set5': (data / 'GTmod4', data / 'LRbicx4')},
        rgb=True,
        picture=tmp_path / 'details.png',
    )
    bicubic, network = (row.quality['Set5'] for row in comparison.rows)
    found = {'psnr': round(network.psnr, 4), 'ssim': round(network.ssim, 4), 'psnr_rgb': round(network.psnr_rgb, 4)}
    assert found == reference[name]['Set5']
    # The papers' tables have 28.42 dB and 0.8104 for MATLAB's bicubic, computed without rounding it to 8 bits.
    assert bicubic.psnr == pytest.approx(28.42, abs=0.02) and bicubic.ssim == pytest.approx(0.8104, abs=0.001)
    # The training form of LKDN-S counts as its deploy form.
    assert comparison.rows[1].cost.parameters == reference[name.replace('-S_x4', '-S_del_rep_x4')]['params']
    assert cv2.imread(str(tmp_path / 'details.png')).shape == (5 * (24 + 192 + 4), 3 * (192 + 4), 3)


def test_option_files_of_basicsr_are_baselines(tmp_path):
    """With weights under each key, and sizes that do not fit the scale or SwinIR's window; without weights, costs."""
    gt = write_images(tmp_path / 'gt', [(62, 75), (53, 60), (80, 64)])
    networks, files = {}, {}
    for index, (name, (arch, arguments)) in enumerate(BASELINES.items()):
        torch.manual_seed(index)
        networks[name] = arch(**arguments).eval()
        key = ('params', 'params_ema', None)[index % 3]
        state = networks[name].state_dict()
        torch.save(state if key is None else {key: state}, tmp_path / f'{name}.pth')
        paths = {} if key == 'params' else {'param_key_g': key}
        files[name] = write_options(tmp_path / f'{name}.yml', name, tmp_path / f'{name}.pth', **paths)
    files['costs only'] = write_options(tmp_path / 'costs.yml', 'EDSR')
    comparison = compare(files, {'mine': (gt, None)})
    assert comparison.scale == 4 and [row.name for row in comparison.rows] == ['bicubic', *files]
    for row in comparison.rows[1:-1]:
        assert row.cost.parameters == sum(value.numel() for value in networks[row.name].parameters())
        found = row.quality['mine']
        assert (found.psnr, found.ssim) == pytest.approx(measured(networks[row.name], gt), abs=5e-3)
    assert comparison.rows[-1].cost == comparison.rows[1].cost and comparison.rows[-1].quality == {}
    assert re.search(r'^costs only +- +[\d,]+', format_table(comparison), re.MULTILINE)


@torch.no_grad()
def measured(network, gt):
    """PSNR and SSIM on Y of a network x4, by BasicSR's functions; padded by reflection to the window of SwinIR."""
    values = []
    for path in sorted(gt.iterdir()):
        image = cv2.imread(str(path))
        height, width = (length // 4 for length in image.shape[:2])
        image = image[: 4 * height, : 4 * width]
        lr = torch.from_numpy(bicubic_downscale(image, 4)[:, :, ::-1].copy()).permute(2, 0, 1)[None] / 255
        if isinstance(network, SwinIR):
            lr = torch.nn.functional.pad(lr, (0, -width % 4, 0, -height % 4), 'reflect')
        output = network(lr)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        output = output[: 4 * height, : 4 * width, ::-1]
        values.append([metric(output, image, 4, test_y_channel=True) for metric in (calculate_psnr, calculate_ssim)])
    return np.mean(values, axis=0)


def test_adapted_and_training_forms_are_measured_as_deployed(tmp_path):
    torch.manual_seed(0)
    trained = DSCLoRA(feature_channels=6, upscale=2, rank=2)
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if name.endswith('lora_B'):
                value.normal_(std=0.1)
    torch.save({'params': trained.state_dict()}, tmp_path / 'adapted.pth')
    torch.save({'params': SPAN(feature_channels=6, upscale=2).state_dict()}, tmp_path / 'branches.pth')
    assert main(['merge', str(tmp_path / 'adapted.pth'), '-o', str(tmp_path / 'merged.pth')]) == 0
    gt = write_images(tmp_path / 'gt', [(40, 48)])
    files = {name: tmp_path / f'{name}.pth' for name in ('adapted', 'branches', 'merged')}
    _, adapted, branches, merged = compare(files, {'mine': (gt, None)}).rows
    assert adapted.cost == branches.cost == merged.cost and merged.cost.convolutions == 22
    assert adapted.quality['mine'].psnr == pytest.approx(merged.quality['mine'].psnr, abs=1e-3)
    assert abs(adapted.quality['mine'].psnr - branches.quality['mine'].psnr) > 0.01


def test_several_sets_and_lr_images_of_any_origin(span, tmp_path, capsys):
    one = write_images(tmp_path / 'one', [(40, 48), (47, 61)])
    two = write_images(tmp_path / 'two, with a comma', [(50, 40)], seed=1)
    lr = tmp_path / 'lr'
    lr.mkdir()
    for path in one.iterdir():
        image = cv2.imread(str(path))
        height, width = (length - length % 2 for length in image.shape[:2])
        cv2.imwrite(str(lr / f'{path.stem}x2.png'), bicubic_downscale(np.ascontiguousarray(image[:height, :width]), 2))
    output = tmp_path / 'table.csv'
    sets = [f'--set=made={one}', f'--set=given={one},{lr}', f'--set=two={two}']
    assert main(['compare', *sets, f'SPAN={span}', '-o', str(output), '--picture', str(tmp_path / 'a.png')]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.split(' {2,}', printed[0].strip())[:3] == ['made (Y)', 'given (Y)', 'two (Y)']
    assert printed[-2:] == [f'wrote {output}', f'wrote {tmp_path / "a.png"}']
    for row in csv.DictReader(io.StringIO(output.read_text())):
        assert row['made_psnr_y'] == row['given_psnr_y'] != row['two_psnr_y']


def test_costs_without_images(tmp_path, span, capsys):
    assert main(['compare', f'SPAN={span}']) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert 'PSNR' not in header and row.split()[:2] == ['SPAN', f'{sum_of(span):,}']


def sum_of(path):
    return sum(value.numel() for value in torch.load(path, weights_only=True).values())


def test_runtime_memory_and_score(monkeypatch, tmp_path, span):
    """What is measured gets into the table; how it is measured is tested with the functions that do it."""
    torch.save(SPAN(feature_channels=8, upscale=2, deploy=True).state_dict(), tmp_path / 'wide.pth')
    seconds = {('small', 'eager'): 0.003, ('small', 'optimized'): 0.001, ('wide', 'eager'): 0.004}
    seconds['wide', 'optimized'] = 0.002
    asked = []
    monkeypatch.setattr(module, 'measure_runtimes', lambda forms, *size: asked.append((list(forms), *size)) or seconds)
    monkeypatch.setattr(module, 'measure_peak_memory', lambda *_: 5_000_000)
    networks = {'small': span, 'wide': tmp_path / 'wide.pth'}
    comparison = compare(networks, baseline='wide', size=(20, 30))
    assert asked[0][:3] == (list(seconds), 20, 30)
    small, wide = (row.cost for row in comparison.rows)
    assert (small.runtime, small.optimized, small.memory, wide.runtime) == (0.003, 0.001, 5_000_000, 0.004)
    expected = ntire_score((3, small.flops, small.parameters), (4, wide.flops, wide.parameters))
    assert small.score == pytest.approx(expected) and wide.score == pytest.approx(math.e**2)
    assert 'input 30x20 (width x height)' in comparison.conditions
    header, line, *notes = format_table(comparison).splitlines()
    assert re.split(' {2,}', header.strip())[-4:] == ['runtime', 'optimized', 'peak memory', 'NTIRE score']
    assert re.split(' {2,}', line)[-4:-1] == ['3.00 ms', '1.00 ms', '5.0 MB']
    assert notes[-1] == 'NTIRE score: baseline wide, lower is better.'
    assert compare(networks).rows[0].cost.runtime is None


TABLE = Comparison(
    [
        Row('bicubic', None, {'A': Fidelity(28.4, 0.8), 'B': Fidelity(math.inf, 1.0)}),
        Row('a|b', Cost(150_688, 8_640_000_000, 9_833_000_000, 41_680_000, 22), {}),
        Row(
            'mine',
            Cost(1000, 2_000_000_000, 3, 4, 5, 0.012345),
            {'A': Fidelity(30.12345, 0.87654), 'B': Fidelity(1, 0)},
        ),
    ],
    4,
    conditions='on a CPU',
)


def test_names_are_text_in_markdown():
    named = replace(TABLE, rows=[replace(TABLE.rows[0], name='<img src=x>|b')])
    assert '&lt;img src=x&gt;\\|b' in format_markdown(named)


def test_forms_of_the_table():
    lines = format_markdown(TABLE).splitlines()
    cells = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines[:5]]
    assert cells[0] == [
        *('', 'A (Y)', 'B (Y)', 'parameters', 'multi-adds, 720p', 'multi-adds, 256x256', 'activations', 'convs'),
        'runtime',
    ]
    assert cells[2] == ['bicubic', '28.4000 / 0.8000', 'inf / 1.0000', *'------']
    assert cells[3] == ['a\\|b', '-', '-', '150,688', '8.64 G', '9.83 G', '41.68 M', '22', '-']
    assert cells[4][1] == '30.1234 / 0.8765' and cells[4][-1] == '12.35 ms'
    assert len({len(line) for line in format_table(TABLE).splitlines()[:4]}) == 1
    records = list(csv.DictReader(io.StringIO(format_csv(TABLE))))
    assert records[1]['A_psnr_y'] == '' and records[1]['activations_256x256'] == '41680000'
    assert float(records[2]['runtime_ms']) == pytest.approx(12.345) and float(records[0]['B_psnr_y']) == math.inf
    content = json.loads(format_json(TABLE), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    assert (content['scale'], content['conditions']) == (4, 'on a CPU')
    assert content['methods'][2]['A_psnr_y'] == 30.12345 and 'A_psnr_y' not in content['methods'][1]


def test_plot_has_psnr_over_multiply_adds():
    pytest.importorskip('matplotlib')
    a, b = plot_comparison(TABLE).axes
    assert (a.get_xscale(), a.get_title()) == ('log', 'A, x4')
    assert [circle.get_offsets().tolist() for circle in a.collections] == [[[2.0, 30.12345]]]
    twice = Row('twice', Cost(2000, 1_000_000_000, 0, 0, 0), {'A': Fidelity(31, 1), 'B': Fidelity(math.inf, 1)})
    a, b = plot_comparison(Comparison([*TABLE.rows, twice], 4)).axes
    first, second = (circle.get_sizes()[0] for circle in a.collections)
    assert second == 2 * first and len(b.collections) == 1


def test_plot_is_written(span, tmp_path):
    pytest.importorskip('matplotlib')
    gt = write_images(tmp_path / 'gt', [(40, 48)])
    assert main(['compare', f'a={span}', f'--set=A={gt}', '--plot', str(tmp_path / 'plot.png')]) == 0
    assert cv2.imread(str(tmp_path / 'plot.png')) is not None


def files_for_mistakes(folder, span):
    write_images(folder / 'gt', [(40, 48)])
    write_images(folder / 'small', [(14, 40)])
    write_images(folder / 'lr', [(10, 12)])
    (folder / 'there.csv').write_text('kept')
    torch.save(SPAN(feature_channels=6, upscale=3).state_dict(), folder / 'x3.pth')
    torch.save(RIDNet(3, 16, 3, num_block=1).state_dict(), folder / 'ridnet.pth')
    write_images(folder / 'twice', [(40, 48)])
    (folder / 'twice' / '0.tif').write_bytes((folder / 'twice' / '0.png').read_bytes())
    torch.save(SRVGGNetCompact(1, 1, 8, 1, 2, 'relu').state_dict(), folder / 'gray.pth')
    write_options(folder / 'lost.yml', 'EDSR', folder / 'lost.pth')
    write_options(folder / 'misfit.yml', 'EDSR', span, param_key_g=None)
    (folder / 'text.yml').write_text('network_g: {type: EDRS}')


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['b={x3.pth}', '--set=A={gt}'], 'The networks have different scales ("a" x2, "b" x3): compare those of'),
        (
            ['--set=A={gt},{lr}'],
            '0.png of the set "A" must have 24 x 20 pixels at x2, the scale of the networks, got 12 x 10',
        ),
        (['--set=A={small}'], '0.png must have at least 16 pixels each way, got 40 x 14.'),
        (['--set=A={no}'], 'no is not a folder'),
        (['--set=A={gt}', '--set=A={lr}'], 'The name "A" is given 2 times'),
        (['b={gray.pth}'], '"b" does not take RGB images of any size'),
        (['b={ridnet.pth}'], '"b" is a RIDNet, for values from 0 to 255'),
        (['--set=A={twice}'], '0.png and 0.tif of the set "A" have one name'),
        (['-o', '{a.md}', '-o', '{gt/../a.md}'], 'a.md is given twice: give each output its own file.'),
        (['--set=A={gt}', '--plot', '{a.png}', '--picture', '{a.png}'], 'a.png is given twice'),
        (['b={lost.yml}'], 'lost.pth cannot be read'),
        (['b={misfit.yml}'], 'span.pth does not fit EDSR'),
        (['b={text.yml}'], '"b": network_g.type'),
        (['bicubic={x3.pth}'], '"bicubic" is the name of another row'),
        (['--baseline', 'c'], 'The baseline "c" is none of the networks, which are a.'),
        (['--size', '20', '20'], 'ask for that too, with --runtime'),
        (['--runtime', '--size', '0', '20'], 'The size of the input must be at least 1x1, got 20x0 (width x height)'),
        (['--picture', '{a.png}'], 'picture was asked for, but no set of images is given'),
        (['--set=A={gt}', '--picture', '{a.jpg}'], 'a.jpg must end in .png'),
        (['--set=A={gt}', '-o', '{a.txt}'], 'a.txt must end in .md or .csv or .json'),
        (['--set=A={gt}', '-o', '{there.csv}'], 'there.csv exists'),
        (['--set=A={gt}', '-o', '{no/a.csv}'], 'of the output does not exist'),
    ],
)
def test_mistakes_are_one_sentence_before_any_run(span, tmp_path, monkeypatch, capsys, arguments, sentence):
    files_for_mistakes(tmp_path, span)
    monkeypatch.setattr(module, 'super_resolve', lambda *_: pytest.fail('a network has run'))
    arguments = [re.sub('{(.+?)}', lambda found: str(tmp_path / found[1]), argument) for argument in arguments]
    before = set(tmp_path.iterdir())
    assert main(['compare', f'a={span}', *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count('\n') == 1
    assert set(tmp_path.iterdir()) == before and (tmp_path / 'there.csv').read_text() == 'kept'


def test_reading_and_measuring_are_only_so_far_ahead():
    """In order, and with a bounded number of images in memory."""
    taken = []
    with ThreadPoolExecutor(4) as pool:
        found = module._ahead(pool, lambda item: item * 10, (taken.append(item) or item for item in range(20)), 3)
        for count, value in enumerate(found, 1):
            assert value == (count - 1) * 10 and len(taken) <= count + 3
    assert count == 20


def test_overwrite_and_damage(span, tmp_path):
    gt = write_images(tmp_path / 'gt', [(40, 48), (40, 48)])
    (tmp_path / 'there.md').write_text('old')
    compare({'a': span}, {'A': (gt, None)}, outputs=[tmp_path / 'there.md'], overwrite=True)
    assert (tmp_path / 'there.md').read_text().startswith('|  | A (Y) |')
    (gt / '1.png').write_bytes((gt / '0.png').read_bytes()[:-100])
    with pytest.raises(InputError, match='1.png is damaged'):
        compare({'a': span}, {'A': (gt, None)}, outputs=[tmp_path / 'new.md'])
    assert not (tmp_path / 'new.md').exists()


def test_broken_images_are_all_named_or_left_out(span, tmp_path, capsys):
    gt = write_images(tmp_path / 'gt', [(40, 48), (42, 48), (8, 8), (44, 50)])
    lr = write_images(tmp_path / 'lr', [(20, 24), (20, 24), (4, 4), (22, 25)], seed=1)
    write_images(tmp_path / 'good', [(40, 48)])
    (gt / '3.png').write_bytes((gt / '3.png').read_bytes()[:-100])
    write_images(tmp_path / 'more', [(40, 48)])
    (tmp_path / 'more/0.png').rename(gt / 'lonely.png')
    command = ['compare', f'a={span}', f'--set=A={gt},{lr}', '-o', str(tmp_path / 't.csv')]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert 'error: 4 of 5 images cannot be used, which --skip-broken leaves out:' in told
    for words in (
        'lonely.png has no LR image',
        '1.png of the set "A" must have 24 x 21 pixels',
        '2.png must have at least 16 pixels each way, got 8 x 8',
        '3.png is',
    ):
        assert words in told
    assert main([*command, '--skip-broken']) == 0
    assert 'note: 4 of 5 images left out:' in capsys.readouterr().err
    assert 'A (1 of 5)' in (tmp_path / 't.csv').read_text()
    for folder in (gt, lr):
        for path in folder.iterdir():
            if path.name != '0.png':
                path.unlink()
    left, alone = compare({'a': span}, {'A': (gt, lr)}), (tmp_path / 't.csv').read_text()
    assert str(left.rows[1].quality['A'].psnr) in alone


@pytest.mark.parametrize('wrong', ['picture', 'plot', 'table'])
def test_images_of_a_set_are_not_written_over(span, tmp_path, wrong):
    gt = write_images(tmp_path / 'gt', [(40, 48)])
    before = (gt / '0.png').read_bytes()
    link = tmp_path / {'picture': 'a.png', 'plot': 'a.png', 'table': 'a.md'}[wrong]
    link.symlink_to(gt / '0.png')
    output = {'outputs': [link]} if wrong == 'table' else {wrong: link}
    with pytest.raises(InputError, match='is an image of a set: choose another output'):
        compare({'a': span}, {'A': (gt, None)}, overwrite=True, **output)
    assert (gt / '0.png').read_bytes() == before


def test_an_option_file_that_cannot_be_read_is_told(span, tmp_path, capsys):
    """And not that the checkpoint does not fit it, which is no mistake."""
    assert main(['compare', f'a={span}', '-opt', str(tmp_path / 'lost.yml')]) == 2
    assert 'lost.yml cannot be read: No such file or directory' in capsys.readouterr().err


def test_values_that_are_not_finite_are_not_rated(tmp_path, span, capsys):
    gt = write_images(tmp_path / 'gt', [(40, 48)])
    state = torch.load(span, weights_only=True)
    state['conv_cat.weight'].fill_(3e38)  # finite, but not what becomes of it
    torch.save(state, tmp_path / 'large.pth')
    assert main(['compare', f'good={span}', f'bad={tmp_path / "large.pth"}', f'--set=A={gt}']) == 2
    found = capsys.readouterr()
    assert f'"bad" cannot be measured on {gt / "0.png"}: The network gives values that are not finite' in found.err
    assert not found.out


def test_who_has_seen_enough_gets_the_files(tmp_path, span, monkeypatch):
    """As in `lora-sr compare … -o table.md | head -1`."""

    def leave(*_, **__):
        raise BrokenPipeError

    gt, output = write_images(tmp_path / 'gt', [(40, 48)]), tmp_path / 'table.md'
    with pytest.raises(BrokenPipeError):
        compare({'a': span}, {'A': (gt, None)}, outputs=[output], on_table=leave)
    assert '| a ' in output.read_text()


def test_a_file_that_cannot_be_written_loses_nothing(tmp_path, span, monkeypatch, capsys):
    def fail(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    gt, output = write_images(tmp_path / 'gt', [(40, 48)]), tmp_path / 'table.md'
    command = ['compare', f'a={span}', f'--set=A={gt}', '-o', str(output)]
    sentence = f'lora-sr: error: The output {output} cannot be written: Read-only file system.\n'
    with monkeypatch.context() as patched:
        patched.setattr(os, 'replace', fail)
        assert main(command) == 2
    found = capsys.readouterr()
    assert 'A (Y)' in found.out and 'wrote' not in found.out and found.err.endswith(sentence)
    monkeypatch.setattr(tempfile, 'TemporaryFile', fail)
    monkeypatch.setattr(module, 'open_network', lambda *_: pytest.fail('a network was read'))
    assert main(command) == 2 and capsys.readouterr().err == sentence
    assert not output.exists()


def test_an_argument_needs_a_name(capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['compare', 'net.pth'])
    assert 'should be NAME=FILE' in capsys.readouterr().err
