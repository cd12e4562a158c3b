"""Reports: what stands in them, and that they fetch nothing and are safe with any name."""

import html
import json
import re
import shlex
import shutil

import browser
import cv2
import numpy as np
import pytest
import torch
from report_pages import Page, report_on
from test_curves import write_log
from tiny_adaptation import write_adaptation

from lora_sr.archs.span import SPAN
from lora_sr.cli.main import build_parser, main
from lora_sr.errors import InputError
from lora_sr.report.chart import Line, draw_chart
from lora_sr.report.markup import STYLE
from lora_sr.report.page import write_report, write_reports
from lora_sr.report.tables import Comparison, Cost, Row, encode_table

NAME = '/nets/<b>&"x".pth'
CROPS, MAPS = 4 * 4, 2 * 3  # images of a report: of four pairs, and of the first and the last of them
FRAMES = """[...document.querySelectorAll('.map')].map(map => {
  const [image, frame] = [...map.children].map(one => one.getBoundingClientRect());
  return [frame.x - image.x, frame.y - image.y, image.right - frame.right, image.bottom - frame.bottom];
})"""


def test_what_an_adaptation_came_to(adapted, tmp_path):
    page = report_on(adapted, tmp_path / 'r.html')
    for part in (
        'SPAN_x2.pth, adapted',
        'Your camera: 23.00 → 24.56 dB (bicubic 22.50).',
        'The network after, at strength 1.25 24.56 (+1.56) 30.25 (-1.25)',
        'bad.png is damaged',
        'LR is shifted by (-0.3, 0.0) LR pixels',
        '-0.30 across, +0.02 down',
        'LoRA of rank 3, and a trained delta of bias: 1,234 of 12,340 parameters (10.0%)',
        '99 iterations. PSNR had stopped rising.',
        '0.006 23.30 +0.30',
        '0.015 diverged',
        'the 2 pairs held back with the highest gain of PSNR and the 2 with the lowest',
        'a weight of 0.4 makes strength 0.5',
    ):
        assert part in page.text, part
    assert [attributes['lang'] for attributes in page.of('html')] == ['en']
    assert 'highest that was tried' not in page.text


def test_a_report_is_the_same_each_time(adapted, tmp_path):
    pages = []
    for name in ('a.html', 'b.html'):
        write_report(adapted, tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_nothing_is_fetched(adapted, tmp_path):
    page = report_on(adapted, tmp_path / 'r.html')
    content = re.sub('base64,[^"]*', '', (tmp_path / 'r.html').read_text())
    assert not re.search(r'https?:|//\w|@import|url\(', content)
    for _, attributes in page.elements:
        assert not attributes.keys() & {'srcset', 'action', 'data', 'xlink:href'}
        for name in ('src', 'href'):
            assert attributes.get(name, 'data:').startswith('data:')
    assert len(page.of('img')) == CROPS + MAPS


def test_headings_and_images_and_sliders_have_their_names(adapted, tmp_path):
    page = report_on(adapted, tmp_path / 'r.html')
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch('h[1-6]', name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert all(attributes['alt'] for attributes in page.of('img'))
    assert all(attributes.get('aria-label') or 'aria-hidden' in attributes for attributes in page.of('svg'))
    assert page.text.count('Divider between before and after, pair') == len(page.of('input')) == 4


def test_names_are_text(tmp_path):
    folder = write_adaptation(tmp_path / '<i>"&', network=NAME)
    for kind in ('HR', 'LR'):
        (folder / 'data/held' / kind / '00.png').rename(folder / 'data/held' / kind / '<s onload="1">&amp;.png')
    record = json.loads((folder / 'adapt.json').read_text())
    record['steps']['pairs']['notes'] = ['</style><script>alert(1)</script>']
    record['steps']['training']['ended'] = "'><u>"
    record['steps']['outcome']['sentence'] = '<b>bold</b> \x1b[31m\udcff'
    (folder / 'adapt.json').write_text(json.dumps(record))
    page = report_on(folder, tmp_path / 'r.html')
    assert not {name for name, _ in page.elements} & {'b', 'i', 's', 'u'} and len(page.of('script')) == 1
    assert not any(name.startswith('on') for _, attributes in page.elements for name in attributes)
    for part in ('<b>&"x".pth', '</style><script>alert(1)</script>', "'><u>", '<b>bold</b> \\x1b[31m\\udcff'):
        assert part in page.text, part
    assert any(attributes['alt'] == 'Before, pair <s onload="1">&amp;' for attributes in page.of('img'))


def test_without_gain_the_best_network_is_shown(tmp_path):
    folder = write_adaptation(tmp_path / 'phone', has_gained=False)
    page = report_on(folder, tmp_path / 'r.html')
    assert 'Nothing was gained.' in page.text and len(page.of('img')) == CROPS + MAPS
    assert 'No merged network was written.' in page.text and 'at strength 0.5' in page.text
    (folder / 'experiments/adapt/models/net_g_best_held.pth').unlink()
    page = report_on(folder, tmp_path / 'r.html')
    assert 'There are no images to show.' in page.text and not page.of('img')


@pytest.mark.parametrize('lost', ['data', 'base.pth', 'merged.pth', 'data/held/LR/02.png'])
def test_what_is_lost_is_told(tmp_path, lost):
    folder = write_adaptation(tmp_path / 'phone')
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report_on(folder, tmp_path / 'r.html')
    assert 'There are no images to show.' in page.text and lost in page.text and '24.56' in page.text


def test_what_does_not_fit_is_told(tmp_path):
    folder = write_adaptation(tmp_path / 'phone')
    torch.save({'params': SPAN(deploy=True, feature_channels=6, upscale=4).state_dict()}, folder / 'merged.pth')
    assert 'must be one for x2, as the one before is, got x4.' in report_on(folder, tmp_path / 'r.html').text
    shutil.copy(folder / 'base.pth', folder / 'merged.pth')
    cv2.imwrite(str(folder / 'data/held/HR/00.png'), np.zeros((8, 8, 3), np.uint8))
    page = report_on(folder, tmp_path / 'r.html')
    assert '00.png must have 120 x 90 pixels (width x height), got 8 x 8.' in page.text
    shutil.rmtree(folder / 'data/held/HR')
    (folder / 'data/held/HR').mkdir()
    assert 'HR must have an image, got none.' in report_on(folder, tmp_path / 'r.html').text


@pytest.mark.parametrize('done', range(6))
def test_an_adaptation_that_is_not_finished(tmp_path, done):
    folder = write_adaptation(tmp_path / 'phone')
    record = json.loads((folder / 'adapt.json').read_text())
    steps = ('pairs', 'start', 'rates', 'training', 'strength', 'outcome')
    record['steps'] = {name: record['steps'][name] for name in steps[:done]}
    (folder / 'adapt.json').write_text(json.dumps(record))
    page = report_on(folder, tmp_path / 'r.html')
    assert 'The adaptation is not finished: the same command goes on with it.' in page.text
    assert ('The learning rate' in page.text) == (done > 2)


@pytest.mark.parametrize(
    'content',
    [
        '',
        '[]',
        '{}',
        '{"request": 1, "seconds": 1, "steps": {}}',
        '{"request": {}, "seconds": [], "steps": 3}',
        '[' * 9999,
    ],
)
def test_what_is_no_record(tmp_path, content):
    (tmp_path / 'adapt.json').write_text(content)
    with pytest.raises(InputError, match=r'adapt\.json must be a record of `lora-sr adapt`, got another file'):
        write_report(tmp_path, tmp_path / 'r.html')
    assert not (tmp_path / 'r.html').exists()


def test_modules_that_a_record_names_are_not_imported(tmp_path):
    """It may be somebody else's folder."""
    folder = write_adaptation(tmp_path / 'phone')
    (tmp_path / 'evil.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    record = json.loads((folder / 'adapt.json').read_text())
    record['request']['network']['imports'] = [str(tmp_path / 'evil.py')]
    (folder / 'adapt.json').write_text(json.dumps(record))
    report_on(folder, tmp_path / 'r.html')
    assert not (tmp_path / 'ran').exists()
    report_on(folder, tmp_path / 'r.html', imports=[str(tmp_path / 'evil.py')])
    assert (tmp_path / 'ran').exists()


def commands_of(file):
    found = re.findall(r'<pre><code>(.*?)</code></pre>', file.read_text(), re.DOTALL)
    return [shlex.split(html.unescape(re.sub('</?span>', '', one))) for one in found]


@pytest.mark.parametrize('has_gained', [True, False])
def test_commands_are_those_of_the_command_line(tmp_path, has_gained):
    folder = write_adaptation(tmp_path / 'my phone', has_gained, network='/my nets/a.pth')
    write_report(folder, tmp_path / 'r.html')
    commands = commands_of(tmp_path / 'r.html')
    assert [one[:2] for one in commands][0] == ['lora-sr', 'adapt'] and len(commands) == 5 - has_gained
    for one in commands:
        build_parser().parse_args(one[1:])
    adapt = build_parser().parse_args(commands[0][1:])
    assert (adapt.checkpoint, adapt.pairs, adapt.minutes) == ('/my nets/a.pth', ['/photos/HR', '/photos/LR'], 2.0)
    assert adapt.share == 0.05 and not adapt.align
    merge = next(one for one in commands if one[1:3] == ['adapter', 'merge'])
    strength = float(merge[4].rpartition('=')[2]) * (1.25 if has_gained else 1)
    assert f'strength {strength:g}' in html.unescape((tmp_path / 'r.html').read_text())


def test_an_adapter_to_go_on_from(tmp_path):
    """What is written has that adapter in it, and is of the network before it: the update alone has other strengths."""
    folder = write_adaptation(tmp_path / 'phone')
    record = json.loads((folder / 'adapt.json').read_text())
    record['request']['from'] = '/nets/old phone.safetensors'
    (folder / 'adapt.json').write_text(json.dumps(record))
    page = report_on(folder, tmp_path / 'r.html')
    assert 'Adapter to go on from /nets/old phone.safetensors' in page.text
    adapt, extract, merge, upscale, _ = commands_of(tmp_path / 'r.html')
    assert adapt[-4:-2] == ['--from', '/nets/old phone.safetensors'] and upscale[4] == f'{folder}/merged.pth'
    assert merge[4] == f'{extract[-1]}=0.5' and str(folder / 'adapter.safetensors') not in extract + merge


def test_a_training_run(tmp_path):
    run = write_log(tmp_path / 'run', [(1000, 'A<b>', '30.0'), (2000, 'A<b>', '31.5'), (2000, 'B', 'inf')])
    assert main(['report', str(run), '-o', str(tmp_path / 'r.html')]) == 0
    page = Page((tmp_path / 'r.html').read_bytes())
    assert 'Training run run' in page.text and '31.50 on A<b> after 2,000 iterations' in page.text
    assert 'A<b> 30.0000 at 1,000 31.5000 at 2,000 31.5000 at 2,000 30.0000 at 1,000' in page.text
    assert 'B, over the iterations: there is nothing to draw.' in page.text
    assert main(['report', str(run), '-o', str(tmp_path / 'o.html'), '--metric', 'other']) == 0
    assert '0.5000 at 1,000' in Page((tmp_path / 'o.html').read_bytes()).text


def comparison():
    from lora_sr.report.fidelity import Fidelity

    quality = {'Set <5>': Fidelity(31.25, 0.875)}
    rows = [Row('bicubic', None, quality), Row('a|b', Cost(1234, 10**9, 10**9, 10**6, 7, runtime=0.0125), quality)]
    return Comparison(rows, 2, None, '256x256, float32, a <CPU>')


@pytest.mark.parametrize('suffix', ['.md', '.csv', '.json'])
def test_a_comparison(tmp_path, suffix):
    (tmp_path / f't{suffix}').write_bytes(encode_table(comparison(), suffix))
    assert main(['report', str(tmp_path / f't{suffix}'), '-o', str(tmp_path / 'r.html')]) == 0
    text = Page((tmp_path / 'r.html').read_bytes()).text
    assert 'Set <5>' in text and '31.25' in text and 'a|b' in text and '1,234 ' in text and '12.50 ms' in text
    assert ('a <CPU>' in text) == (suffix != '.csv')


@pytest.mark.parametrize('suffix', ['.md', '.csv', '.json'])
@pytest.mark.parametrize(
    'content', [b'', b'\xff', b'|a|\n|b|\n', b'a,b\n1,2\n', b'{"methods": [3], "scale": 2}', b'[1]']
)
def test_what_is_no_comparison(tmp_path, suffix, content):
    (tmp_path / f't{suffix}').write_bytes(content)
    with pytest.raises(InputError, match='must be a table of `lora-sr compare`, got another file'):
        write_reports([tmp_path / f't{suffix}'], tmp_path / 'r.html')


def test_several_runs_have_their_curves_together(adapted, tmp_path):
    run = write_log(tmp_path / 'phone', [(1000, 'held', '30.0'), (2000, 'held', '31.0')])
    (tmp_path / 't.md').write_bytes(encode_table(comparison(), '.md'))
    write_reports([run, adapted, tmp_path / 't.md', run], tmp_path / 'r.html')
    page = Page((tmp_path / 'r.html').read_bytes())
    assert page.text.startswith('4 runs and comparisons 4 runs and comparisons All curves')
    together = page.of('svg')[0]['aria-label']
    assert (
        f'Training run phone ({run}), 1: 30.00 at 1000' in together and 'SPAN_x2.pth, adapted: 23.00 at 0' in together
    )
    assert f'Training run phone ({run}), 2: 30.00' in together
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch('h[1-6]', name)]
    assert levels.count(2) == 5 and all(after <= before + 1 for before, after in zip(levels, levels[1:]))


def test_wrong_input_is_one_sentence(adapted, tmp_path, capsys):
    (tmp_path / 'x.txt').write_text('mine')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'r.html').write_text('mine')
    for run, output, told in (
        ('empty', 'a.html', 'must be a folder of `lora-sr adapt`, with adapt.json, or of a training run'),
        ('nowhere', 'a.html', 'must be a folder or a table of `lora-sr compare`, got nothing of that name'),
        ('x.txt', 'a.html', 'must be a folder or a table of `lora-sr compare` (.md, .csv, .json), got another file'),
        (adapted, 'r.html', 'r.html exists: choose another name, or allow it with --overwrite'),
        (adapted, 'r.pdf', 'r.pdf must end in .html'),
    ):
        assert main(['report', str(tmp_path / run), '-o', str(tmp_path / output)]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count('\n') == 1
    assert (tmp_path / 'r.html').read_text() == 'mine'
    assert main(['report', str(adapted), '-o', str(tmp_path / 'r.html'), '--overwrite']) == 0
    assert capsys.readouterr().out == f'wrote {tmp_path}/r.html\n'


@pytest.mark.parametrize(
    'points',
    [{}, {1.0: 2.0}, {0.0: 0.0, 1e11: 1e-11}, {0.0: -5.0, 3.0: 1e300}, {1.0: float('nan'), 2.0: 3.0}, {0.0: 1e9}],
)
def test_charts_of_any_numbers(points):
    chart = draw_chart('A', 'x', 'y', [Line('a', points), Line('b', {0.5: 1.0})], {'level': 2.0, 'none': float('inf')})
    numbers = re.findall(r'(?<![\w.#-])-?\d+\.?\d*(?:e[+-]?\d+)?', ' '.join(re.findall(r' d="([^"]*)"', chart)))
    assert numbers and all(-400 < float(one) < 400 for one in numbers) and 'nan' not in chart.split('<details>')[0]


@pytest.mark.parametrize('scheme', ['light', 'dark', 'print'])
def test_contrast(scheme):
    """WCAG AA: 4.5 for text, 3 for what is drawn."""

    def luminance(color):
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    roots = re.findall(r':root \{(.*?)\}', STYLE.read_text(), re.DOTALL)
    colors = dict(re.findall(r'--(\w+): (#\w{6})', roots[('light', 'dark', 'print').index(scheme)]))
    assert len(roots) == 3 and len(colors) == 13
    for ink in ('ink', 'soft', 'link'):
        for paper in ('paper', 'panel') + ('chosen',) * (ink == 'ink'):
            assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)
    for number in range(6):
        assert contrast(colors[f'c{number}'], colors['paper']) >= 3


@pytest.mark.slow
@pytest.mark.skipif(browser.find_chromium() is None, reason='there is no Chromium: apt-get install chromium')
def test_in_a_browser(adapted, tmp_path):
    write_report(adapted, tmp_path / 'r.html')
    with browser.open_browser(tmp_path / 'browser') as tab:
        for width, dark in ((360, False), (360, True), (1200, False)):
            tab.open(tmp_path / 'r.html', width, dark=dark)
            assert tab.evaluate('document.documentElement.scrollWidth') <= width
            paper = tab.evaluate('getComputedStyle(document.body).backgroundColor')
            assert (paper == 'rgb(255, 255, 255)') is not dark
            for left, top, right, bottom in tab.evaluate(FRAMES):
                assert min(left, top, right, bottom) > -0.5  # of a frame to the edges of its map
        # By keyboard: from link to link, until a slider has the focus, and shows it.
        for _ in range(40):
            tab.press('Tab', 9)
            if tab.evaluate('document.activeElement.type') == 'range':
                break
        focused = 'document.activeElement'
        assert tab.evaluate(f'{focused}.labels[0].innerText').startswith('Divider between before and after, pair')
        assert tab.evaluate(f'getComputedStyle({focused}).outlineStyle') == 'solid'
        where = f"getComputedStyle({focused}.closest('.pair').querySelector('.over img')).clipPath"
        assert tab.evaluate(where) == 'inset(0px 0px 0px 50%)'
        for _ in range(3):
            tab.press('ArrowRight', 39)
        assert tab.evaluate(f'{focused}.value') == '53' and tab.evaluate(where) == 'inset(0px 0px 0px 53%)'
        tab.press('Home', 36)
        assert tab.evaluate(where) == 'inset(0px 0px 0px 0%)'
        assert tab.evaluate(f"{focused}.getAttribute('aria-valuetext')").startswith('before up to 0%')
        assert all(tab.evaluate('[...document.images].map(one => one.naturalWidth > 0)'))
        fetched = [
            one['params']['request']['url'] for one in tab.events if one['method'] == 'Network.requestWillBeSent'
        ]
        assert {url.partition(':')[0] for url in fetched if not url.endswith('/r.html')} <= {'data'}
        assert not [one for one in tab.events if one['method'] in ('Log.entryAdded', 'Runtime.exceptionThrown')]
        line = tab.evaluate(
            "getSelection().selectAllChildren(document.querySelector('pre')) || getSelection().toString().trim()"
        )
        assert shlex.split(line) == commands_of(tmp_path / 'r.html')[0] and '\n' not in line
        # In print both halves stand side by side.
        tab.open(tmp_path / 'r.html', 700, media='print')
        boxes = tab.evaluate(
            "[...document.querySelector('.stage').querySelectorAll('img')].map(one => one.getBoundingClientRect().x)"
        )
        assert boxes[0] + 100 < boxes[1]
        assert tab.evaluate("getComputedStyle(document.querySelector('.over img')).clipPath") == 'none'
        tops = tab.evaluate(
            "[...document.querySelector('.maps').querySelectorAll('img')].map(one => one.getBoundingClientRect().y)"
        )
        assert len(tops) == 3 and len(set(tops)) == 1
        assert tab.evaluate("getComputedStyle(document.querySelector('.slider')).display") == 'none'
