"""A network of the user's own walks the whole way, by option file and `--import`, and its images stay its own."""

import importlib.util
import json
import re
import sys

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from basicsr.metrics import calculate_psnr
from own_network import SOURCE
from tiny_run import TINY_OPTIONS, run_python, write_pairs

from lora_sr.adapters import add_lora, infer_lora_config
from lora_sr.checkpoints import NetworkSource, load_network

pytestmark = pytest.mark.slow

LORA = {'groups': ['all'], 'rank': 2, 'alpha': 2}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The file of the network, a random base, an option file, and the checkpoint of a run of six iterations."""
    folder = tmp_path_factory.mktemp('own')
    (folder / 'own_arch.py').write_text(SOURCE)
    write_pairs(folder / 'pairs', gt_size=48)
    torch.manual_seed(0)
    torch.save({'params': own_class(folder)().state_dict()}, folder / 'base.pth')
    options = yaml.safe_load(TINY_OPTIONS.format(root=folder / 'pairs', suffix='', backend='disk'))
    options['imports'] = ['own_arch.py']
    options['network_g'] = {'type': 'AdaptSR', 'base': {'type': 'OwnNet', 'width': 8, 'scale': 2}, 'lora': LORA}
    options['path']['pretrain_network_g'] = 'base.pth'
    options['val'] = None
    options['train']['optim_g']['lr'] = 0.05
    options['datasets'].pop('val')
    options['datasets']['train']['gt_size'] = 32
    (folder / 'own.yml').write_text(yaml.safe_dump(options))
    run_python('-m', 'lora_sr.train', '-opt', 'own.yml', cwd=folder)
    (folder / 'adapted.pth').write_bytes((folder / 'experiments/tiny/models/net_g_latest.pth').read_bytes())
    return folder


def own_class(folder):
    name = f'own_{folder.name}'
    source = SOURCE.replace('@ARCH_REGISTRY.register()\n', '')
    (folder / f'{name}.py').write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.OwnNet


def live(folder):
    """The adapted network, built and loaded without this package's way in."""
    state = torch.load(folder / 'adapted.pth', weights_only=True)['params']
    network = add_lora(own_class(folder)(), infer_lora_config(state))
    network.load_state_dict(state, strict=True)
    return network.eval()


def mean_psnr(network, pairs):
    """On Y, by BasicSR, two pixels of border left out."""
    values = []
    for file in sorted((pairs / 'lq').iterdir()):
        lr = torch.from_numpy(cv2.imread(str(file))[:, :, ::-1].transpose(2, 0, 1) / np.float32(255))[None]
        with torch.no_grad():
            image = network(lr)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()[:, :, ::-1]
        original = cv2.imread(str(pairs / 'gt' / file.name))
        values.append(calculate_psnr(image, original, crop_border=2, test_y_channel=True))
    return np.mean(values)


def lora_sr(folder, *arguments, status=0):
    return run_python('-m', 'lora_sr.cli.main', *arguments, cwd=folder, status=status)


TEACH = ('-opt', 'own.yml')


@pytest.mark.slow
def test_the_whole_way(folder):
    with torch.no_grad():
        image = torch.rand(1, 3, 24, 30, generator=torch.Generator().manual_seed(0))
        network = live(folder)
        expected = network(image)
        base = own_class(folder)()
        base.load_state_dict(torch.load(folder / 'base.pth', weights_only=True)['params'])
        assert (expected - base.eval()(image)).abs().max() > 1e-3  # it has learned something
    tolerance = 1e-5 * expected.abs().max()

    shown = lora_sr(folder, 'inspect', 'adapted.pth', *TEACH).stdout
    assert 'OwnNet' in shown and 'x2' in shown

    lora_sr(folder, 'merge', 'adapted.pth', *TEACH, '-o', 'merged.pth')
    plain = own_class(folder)()
    plain.load_state_dict(torch.load(folder / 'merged.pth', weights_only=True)['params'], strict=True)
    assert plain.second.weight is plain.first.weight
    with torch.no_grad():
        assert (plain.eval()(image) - expected).abs().max() <= tolerance

    picture = np.random.default_rng(0).integers(0, 256, (25, 31, 3), dtype=np.uint8)  # odd: it wants multiples of 2
    cv2.imwrite(str(folder / 'picture.png'), picture)
    lora_sr(folder, 'upscale', 'picture.png', '-m', 'merged.pth', *TEACH, '-o', 'large.png')
    lr = torch.from_numpy(np.ascontiguousarray(picture[:, :, ::-1].transpose(2, 0, 1)) / np.float32(255))[None]
    with torch.no_grad():
        padded = torch.nn.functional.pad(lr, (0, 1, 0, 1), 'reflect')
        large = network(padded)[0, :, :50, :62].clamp(0, 1).numpy()
    written = cv2.imread(str(folder / 'large.png'))[:, :, ::-1].transpose(2, 0, 1)
    # 1e-5 of the range, and what rounding to 8 bits makes of it.
    assert np.abs(written - 255 * large).max() <= 0.5 + 255e-5

    lora_sr(folder, 'export', 'onnx', 'merged.pth', *TEACH, '-o', 'merged.onnx')
    session = onnxruntime.InferenceSession(folder / 'merged.onnx')
    exported = torch.from_numpy(session.run(None, {'input': image.numpy()})[0])
    assert (exported - expected).abs().max() <= tolerance
    lora_sr(folder, 'export', 'torchscript', 'merged.pth', *TEACH, '-o', 'merged.pt')
    with torch.no_grad():
        assert (torch.jit.load(folder / 'merged.pt')(image) - expected).abs().max() <= tolerance

    lora_sr(folder, 'submission', '-m', 'merged.pth', *TEACH, '--team', '7', '--name', 'Own', '-o', 'submission')
    program = (
        'import sys, torch; sys.path.insert(0, "submission"); from models.team07_Own import Own;'
        'network = Own().eval();'
        'network.load_state_dict(torch.load("submission/model_zoo/team07_Own.pth"), strict=True);'
        'image = torch.rand(1, 3, 24, 30, generator=torch.Generator().manual_seed(0));'
        'torch.save(network(image).detach(), "submitted.pt"); assert "lora_sr" not in sys.modules'
    )
    run_python('-I', '-c', program, cwd=folder)
    assert (torch.load(folder / 'submitted.pt') - expected).abs().max() <= tolerance

    sets = f'pairs={folder / "pairs/gt"},{folder / "pairs/lq"}'
    lora_sr(folder, 'compare', 'mine=merged.pth', *TEACH, '--set', sets, '-o', 'table.json')
    (mine,) = [row for row in json.loads((folder / 'table.json').read_text())['methods'] if row['name'] == 'mine']
    found = [value for key, value in mine.items() if 'psnr' in key.lower()]
    assert found == pytest.approx([mean_psnr(network, folder / 'pairs')], abs=1e-3)


@pytest.mark.slow
def test_its_files_name_their_network_themselves(folder):
    """What a run writes says which network it is of; what is missing is the module that has it."""
    done = lora_sr(folder, 'merge', 'adapted.pth', '--import', 'own_arch.py', '-o', 'again.pth')
    assert 'OwnNet' in done.stdout
    shown = lora_sr(folder, 'inspect', 'again.pth', '--import', 'own_arch.py').stdout
    assert 'run tiny' in shown
    refused = lora_sr(folder, 'upscale', 'own.yml', '-m', 'again.pth', '-o', 'x', status=2).stderr
    assert re.search(r"no network 'OwnNet'.*--import", refused)


def test_in_python(folder):
    source = NetworkSource(folder / 'adapted.pth', options=folder / 'own.yml', imports=[str(folder / 'own_arch.py')])
    network = load_network(source)
    image = torch.rand(1, 3, 8, 10)
    with torch.no_grad():
        assert torch.equal(network(image), live(folder)(image))
        assert load_network(network) is network
