"""`lora-sr attribution`: the window, the part that is looked at, the picture, and what it refuses."""

import cv2
import numpy as np
import pytest
import torch
from test_attribution import detail
from tiny_commands import write_inputs

from lora_sr import load_network
from lora_sr.archs.span import SPAN
from lora_sr.cli.main import main
from lora_sr.errors import InputError
from lora_sr.report.attribution import attribution_map, diffusion_index
from lora_sr.report.attribution_picture import choose_window, draw_attributions
from lora_sr.runtime.pixels import image_to_tensor


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def two(tmp_path):
    """Two SPAN x2 of different weights, and an LR image of 30x40 pixels."""
    for seed, name in enumerate('ab'):
        torch.manual_seed(seed)
        torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), tmp_path / f'{name}.pth')
    cv2.imwrite(str(tmp_path / 'lr.png'), noise(30, 40))
    return tmp_path


def test_networks_are_looked_at_where_they_differ_most():
    outputs = [noise(30, 40, seed) for seed in range(3)]
    found = choose_window(outputs, 6)

    def difference(x, y):
        parts = np.stack([output[y : y + 6, x : x + 6] for output in outputs]).astype(int)
        return np.ptp(parts, axis=0).sum()

    best = max(((x, y) for y in range(6, 30 - 12 + 1) for x in range(6, 40 - 12 + 1)), key=lambda at: difference(*at))
    assert found == (*best, 6)


def test_one_network_is_looked_at_where_it_has_most_detail():
    """By the detector of the maps."""
    output = noise(30, 40)
    tensor = torch.from_numpy(output.astype(np.float64).transpose(2, 0, 1))[None]
    candidates = [(x, y, 6) for y in range(6, 30 - 12 + 1) for x in range(6, 40 - 12 + 1)]
    assert choose_window([output], 6) == max(candidates, key=lambda window: detail(tensor, window))


@pytest.mark.parametrize('shape, side', [((16, 16), 16), ((17, 40), 16), ((2, 3), 1), ((5, 5), 5)])
def test_windows_have_room_in_small_outputs(shape, side):
    for count in (1, 2):
        x, y, found = choose_window([noise(*shape, seed) for seed in range(count)], side)
        assert found == side and 0 <= x <= shape[1] - side and 0 <= y <= shape[0] - side


@pytest.mark.parametrize(
    'window, part',
    [
        ((36, 26, 8), (12, 7, 16, 16)),  # its middle is the pixel 20, 15
        ((0, 0, 8), (0, 0, 16, 16)), ((72, 52, 8), (24, 14, 16, 16)), ((37, 27, 7), (12, 7, 16, 16)),
        ((5, 5, 32), None), ((4, 4, 32), (2, 2, 16, 16)),
    ],
)  # fmt: skip
def test_the_part_that_is_looked_at(two, window, part):
    """Of 16x16 LR pixels, with the window in its middle as far as the image goes."""
    if part is None:
        with pytest.raises(InputError, match='The context must be at least 17 LR pixels for this window, got 16[.]'):
            draw_attributions({'a': two / 'a.pth'}, two / 'lr.png', two / 'o.png', window, 2, 16)
        return
    found = draw_attributions({'a': two / 'a.pth'}, two / 'lr.png', two / 'o.png', window, 2, 16)
    assert found.context == part
    left, top, width, height = part
    image = image_to_tensor(noise(30, 40)[top : top + height, left : left + width])
    inner = (window[0] - 2 * left, window[1] - 2 * top, window[2])
    expected = attribution_map(load_network(two / 'a.pth'), image, inner, 2)
    np.testing.assert_allclose(found.maps['a'], expected, atol=1e-5)
    assert found.indices == {'a': diffusion_index(found.maps['a'])}


def test_the_command(two, capsys):
    command = [
        'attribution',
        f'first={two}/a.pth',
        f'{two}/b.pth',
        f'{two}/lr.png',
        '-o',
        f'{two}/o.png',
        '--steps',
        '2',
    ]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('window: 16 x 16 pixels of the output at x ') and lines[-1] == f'wrote {two}/o.png'
    assert [line.split()[0] for line in lines[2:4]] == ['first', 'b']
    picture = cv2.imread(str(two / 'o.png'))
    assert picture.shape == (24 + 30 * 6 + 4, 3 * (40 * 6 + 4), 3)
    panels = [panel[24:-4, 2:-2].astype(int) for panel in np.split(picture, 3, axis=1)]
    is_marked = (panels[0] == (0, 255, 255)).all(2)
    rows, columns = np.nonzero(is_marked)
    assert np.ptp(rows) == np.ptp(columns) == 16 * 3 - 1  # an output pixel is 3 of the picture's
    whole = np.kron(noise(30, 40), np.ones((6, 6, 1), int))
    assert (panels[0] == whole)[~is_marked].all()
    assert all((panel[..., 0] == panel[..., 1])[~is_marked].all() for panel in panels[1:])  # red over gray
    assert not np.array_equal(panels[1], panels[2])
    assert main(command) == 2
    assert 'o.png exists: choose another name' in capsys.readouterr().err
    assert main([*command, '--overwrite', '--window', '8', '10', '4', '--context', '12']) == 0
    assert 'window: 4 x 4 pixels of the output at x 8, y 10, in 12 x 12 LR pixels' in capsys.readouterr().out


def test_networks_of_every_kind(tmp_path, capsys):
    """An option file serves the checkpoint that is of its network; LoRA is merged; an adapter goes on top."""
    write_inputs(tmp_path)
    files = [f'{tmp_path}/{name}' for name in ('base.pth', 'lora.pth', 'resnet.pth', 'lq/000.png')]
    command = ['attribution', *files, '-o', f'{tmp_path}/o.png', '--steps', '1', '-opt', f'{tmp_path}/adapt.yml']
    assert main(command) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == ['base', 'lora', 'resnet']
    command = ['attribution', files[0], files[3], '-o', f'{tmp_path}/p.png', '--adapter', f'{tmp_path}/a.safetensors']
    assert main([*command, '--steps', '1']) == 0


@pytest.mark.parametrize(
    'words, message',
    [
        (['a.pth', 'lr.png', '--window', '80', '0', '1'], 'The window must be a square within the 80 x 60 pixels'),
        (['a.pth', 'lr.png', '--steps', '0'], 'The steps must be from 1 to 1,000, got 0.'),
        (['a.pth', 'lr.png', '--steps', '1001'], 'from 1 to 1,000, got 1001.'),
        (['a.pth', '.'], 'the image . cannot be read: it must be a file, got a folder'),
        (['a.pth', 'lr.png', '--context', '0'], 'The context must be at least 1 LR pixel, got 0.'),
        (['a.pth', 'x=a.pth', 'none.png'], 'none.png cannot be read'),
        (['a.pth', 'a=b.pth', 'lr.png'], 'The name "a" is given 2 times'),
        (['a.pth', 'x4.pth', 'lr.png'], 'The networks must have one scale, got "a" x2, "x4" x4.'),
        (['none.pth', 'lr.png'], '"none": '), (['a.pth', 'flat.png'], 'The window must show what depends on details'),
        (['a.pth', 'lr.png', '-o', 'o.jpg'], 'must end in .png'),
        (['a.pth', 'lr.png', '-o', 'no/o.png'], 'The folder no of the output does not exist'),
        (['a.pth', 'lr.png', '-o', 'lr.png', '--overwrite'], 'is the input'),
        (['wrong.pth', 'lr.png'], '"wrong": '), (['gray.pth', 'lr.png'], '"gray" must take and give RGB images'),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(two, monkeypatch, capsys, words, message):
    monkeypatch.chdir(two)
    torch.save(SPAN(feature_channels=6, upscale=4, deploy=True).state_dict(), 'x4.pth')
    torch.save(SPAN(1, 1, feature_channels=6, upscale=2, deploy=True).state_dict(), 'gray.pth')
    torch.save({name: value * torch.nan for name, value in torch.load('a.pth').items()}, 'wrong.pth')
    cv2.imwrite('flat.png', np.full((20, 20, 3), 90, np.uint8))
    assert main(['attribution', *words, *([] if '-o' in words else ['-o', 'o.png'])]) == 2
    error = capsys.readouterr().err
    assert error.startswith('lora-sr: error: ') and message in error and error.count('\n') == 1
    assert not (two / 'o.png').exists()


def test_an_argument_may_be_without_a_name(capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['attribution', '=x', 'lr.png', '-o', 'a.png'])
    assert "'=x' should be NAME=CHECKPOINT or CHECKPOINT" in capsys.readouterr().err
