"""LPIPS and DISTS: what reaches pyiqa, what validation makes of it, and what is said where it is missing."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from urllib.error import URLError

import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.metrics import calculate_metric
from basicsr.models import build_model
from tiny_run import python_environment
from torch.nn import functional as F

from lora_sr.basicsr import metrics as iqa_metric
from lora_sr.basicsr.metrics import lower_is_better
from lora_sr.basicsr.options import check_options
from lora_sr.basicsr.options.check import for_screen
from lora_sr.errors import InputError
from lora_sr.option_file import load_options

CHANNELS = np.array([1.0, 10.0, 100.0])  # what the fake below gives red, green and blue


class FakeIQA(types.ModuleType):
    """Stands in for pyiqa: its metrics take the mean of img - img2, with a weight for each channel."""

    def __init__(self):
        super().__init__('pyiqa')
        self.created, self.shapes, self.error, self.values = [], [], None, None

    def create_metric(self, name, device=None):
        if self.error is not None:
            raise self.error
        self.created.append((name, device.type))
        return self.measure

    def measure(self, img, img2):
        assert img.dtype == img2.dtype == torch.float32
        assert all(0 <= image.min() and image.max() <= 1 for image in (img, img2))
        self.shapes.append(tuple(img.shape))
        if self.values is not None:
            return torch.tensor([[self.values.pop(0)]])
        weights = torch.tensor(CHANNELS).view(1, 3, 1, 1)
        return (weights * (img.double() - img2.double())).mean([1, 2, 3])[:, None]


@pytest.fixture(autouse=True)
def forget_networks():
    iqa_metric._network.cache_clear()
    yield
    iqa_metric._network.cache_clear()


@pytest.fixture
def pyiqa(monkeypatch) -> FakeIQA:
    fake = FakeIQA()
    monkeypatch.setitem(sys.modules, 'pyiqa', fake)
    return fake


def images(*shape):
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))


def expected(img, img2, border=0) -> float:
    """Of BGR images of shape (H, W, 3)."""
    difference = (img.astype(np.float64) - img2.astype(np.float64)) / 255
    if border:
        difference = difference[border:-border, border:-border]
    return float((difference.mean((0, 1)) * CHANNELS[::-1]).mean())


@pytest.mark.parametrize('border', [0, 3])
@pytest.mark.parametrize('name', ['lpips', 'dists'])
def test_images_reach_pyiqa_as_rgb(pyiqa, name, border):
    img, img2 = images(20, 30, 3)
    value = calculate_metric({'img': img, 'img2': img2}, {'type': f'calculate_{name}', 'crop_border': border})
    assert isinstance(value, float)
    assert value == pytest.approx(expected(img, img2, border), abs=1e-6)
    assert pyiqa.created == [(name, 'cuda' if torch.cuda.is_available() else 'cpu')]
    assert pyiqa.shapes == [(1, 3, 20 - 2 * border, 30 - 2 * border)]


def test_other_forms_of_images(pyiqa):
    img, img2 = images(12, 14, 3)
    value = expected(img, img2, 2)
    floats = iqa_metric.calculate_lpips(img.astype(np.float64), img2.astype(np.float64), 2)
    planes = iqa_metric.calculate_lpips(img.transpose(2, 0, 1), img2.transpose(2, 0, 1), 2, input_order='CHW')
    assert floats == pytest.approx(value, abs=1e-6) and planes == pytest.approx(value, abs=1e-6)
    gray, gray2 = img[..., 0], img2[..., 0]
    value = expected(np.stack([gray] * 3, -1), np.stack([gray2] * 3, -1))
    assert iqa_metric.calculate_lpips(gray, gray2, 0) == pytest.approx(value, abs=1e-6)
    assert len(pyiqa.created) == 1  # the network is kept
    with pytest.raises(InputError, match=r'images of one shape, not \(12, 14, 3\) and \(12, 14\)'):
        iqa_metric.calculate_lpips(img, gray, 0)


@pytest.fixture
def validation(pairs):
    """A model that measures with LPIPS, and two of its pairs."""
    metrics = {'lpips': {'type': 'calculate_lpips', 'crop_border': 2, 'better': 'lower'}}
    network = {'type': 'MSRResNet', 'num_feat': 2, 'num_block': 1, 'upscale': 2}
    torch.manual_seed(0)
    opt = {'num_gpu': 0, 'is_train': False, 'dist': False, 'path': {}, 'network_g': network, 'rank': 0}
    model = build_model({'model_type': 'SRModel', 'val': {'metrics': metrics}, **opt})
    roots = {f'dataroot_{kind}': str(pairs / kind) for kind in ('gt', 'lq')}
    section = {'name': 'val', 'type': 'PairedImageDataset', 'phase': 'val', 'scale': 2, 'io_backend': {'type': 'disk'}}
    dataset = build_dataset({**section, **roots})
    dataset.paths = dataset.paths[:2]
    return model, build_dataloader(dataset, section)


def test_average_over_a_data_set(pyiqa, validation):
    model, loader = validation
    model.nondist_validation(loader, 1, None, False)
    values = []
    for pair in loader:
        with torch.no_grad():
            outputs = [model.net_g(pair['lq']), pair['gt']]
        img, img2 = ((image[0].clamp(0, 1) * 255).round().numpy().transpose(1, 2, 0)[..., ::-1] for image in outputs)
        values.append(expected(img, img2, 2))
    assert abs(values[0] - values[1]) > 1e-3
    assert model.metric_results['lpips'] == pytest.approx(np.mean(values), abs=1e-6)


def test_the_least_is_the_best(pyiqa, validation):
    model, loader = validation
    pyiqa.values = [3.0, 5.0, 1.0, 2.0, 2.0, 4.0]
    for iteration in (10, 20, 30):
        model.nondist_validation(loader, iteration, None, False)
    assert model.best_metric_results['val']['lpips'] == {'better': 'lower', 'val': 1.5, 'iter': 20}


# --- what is said before a run ---


@pytest.fixture
def options(tiny_options, monkeypatch):
    monkeypatch.setattr('lora_sr.basicsr.options.fit.NEEDED', {})  # of NIQE, which these images are too small for
    opt = load_options(tiny_options)
    opt['val']['metrics']['lpips'] = {'type': 'calculate_lpips', 'crop_border': 2, 'better': 'lower'}
    opt['val']['metrics']['niqe'] = {'type': 'calculate_niqe', 'crop_border': 2, 'better': 'lower'}
    return opt


def test_network_is_built_before_the_run_and_kept(pyiqa, options, tmp_path):
    assert check_options(options, True, tmp_path) == []
    img, img2 = images(8, 8, 3)
    iqa_metric.calculate_lpips(img, img2, 0)
    assert len(pyiqa.created) == 1


def test_pyiqa_is_not_installed(monkeypatch, options, tmp_path):
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    sentence = 'calculate_lpips needs pyiqa: pip install lora-sr[iqa]'
    assert check_options(options, True, tmp_path) == [f'val.metrics.lpips: {sentence}']
    with pytest.raises(InputError, match='calculate_dists needs pyiqa: pip'):
        iqa_metric.calculate_dists(*images(8, 8, 3), 0)


def test_pyiqa_lacks_something(monkeypatch, options, tmp_path):
    (tmp_path / 'pyiqa.py').write_text('import no_such_package')
    monkeypatch.delitem(sys.modules, 'pyiqa', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    reason = "which fails to load (No module named 'no_such_package')"
    sentence = f'val.metrics.lpips: calculate_lpips needs pyiqa, {reason}: pip install lora-sr[iqa]'
    assert check_options(options, True, tmp_path) == [sentence]


def test_weights_that_cannot_be_had(pyiqa, monkeypatch, options, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    pyiqa.error = URLError('no network')
    start = (
        'val.metrics.lpips: calculate_lpips has no weights, and pyiqa cannot fetch them (<urlopen error no network>)'
    )
    network, metric = (tmp_path / 'hub' / file for file in iqa_metric.WEIGHTS['lpips'])
    both = f'{network.name} into {network.parent} and {metric.name} into {metric.parent}'
    assert check_options(options, True, tmp_path) == for_screen([f'{start}: put {both}'])
    for file in (network, metric):
        file.parent.mkdir(parents=True)
        file.write_bytes(b'')
        if file == network:
            assert check_options(options, True, tmp_path) == for_screen(
                [f'{start}: put {metric.name} into {metric.parent}']
            )
    pyiqa.error = RuntimeError('not a zip archive\nmore')
    sentence = f'cannot be set up by pyiqa (not a zip archive): {network} or {metric} may be damaged'
    assert check_options(options, True, tmp_path) == for_screen([f'val.metrics.lpips: calculate_lpips {sentence}'])


@pytest.mark.parametrize(
    ('metric', 'better', 'sentence'),
    [
        ('lpips', 'higher', 'val.metrics.lpips.better has to be lower, since less is better in calculate_lpips'),
        ('lpips', None, 'val.metrics.lpips.better has to be higher or lower, not None'),
        ('niqe', 'higher', 'val.metrics.niqe.better has to be lower, since less is better in calculate_niqe'),
        ('psnr', 'Higher', "val.metrics.psnr.better has to be higher or lower, not 'Higher'"),
        ('psnr', 'higher', None),
    ],
)
def test_which_is_better(pyiqa, options, tmp_path, metric, better, sentence):
    options['val']['metrics'][metric]['better'] = better
    assert check_options(options, True, tmp_path) == [sentence] * (sentence is not None)


def test_less_is_better_by_the_metric_itself(pyiqa, options, tmp_path):
    del options['val']['metrics']['lpips']['better']
    assert check_options(options, True, tmp_path) == []


def test_which_metrics_are_better_the_lower():
    better = {f'calculate_{name}': lower_is_better(f'calculate_{name}') for name in ('psnr', 'ssim', 'niqe', 'fid')}
    assert better == dict(calculate_psnr=False, calculate_ssim=False, calculate_niqe=True, calculate_fid=True)
    assert lower_is_better('calculate_lpips') and lower_is_better('calculate_dists')


def test_the_least_niqe_is_the_best(validation):
    """BasicSR's own metric, in an option file that says nothing of what is better."""
    model, loader = validation
    model.opt['val']['metrics'] = {'niqe': {'type': 'calculate_niqe', 'crop_border': 0}}
    model._initialize_best_metric_results('val')
    for iteration, value in ((10, 5.0), (20, 4.0), (30, 4.5)):
        model._update_best_metric_result('val', 'niqe', value, iteration)
    assert model.best_metric_results['val']['niqe'] == {'better': 'lower', 'val': 4.0, 'iter': 20}


# --- pyiqa itself ---

# (channels, kernel, stride, padding, max-pooled before) of AlexNet's convolutions, from its paper's torch form.
ALEXNET = [(64, 11, 4, 2, False), (192, 5, 1, 2, True), (384, 3, 1, 1, True), (256, 3, 1, 1, False)]
ALEXNET.append((256, 3, 1, 1, False))


def lpips(img, img2, convolutions, heads) -> float:
    """LPIPS as its paper defines it, in float64: (1, 3, H, W), RGB in [0, 1]."""
    shift, scale = (torch.tensor(row).view(1, 3, 1, 1) for row in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    pair, total = (torch.cat([img, img2]) * 2 - 1 - shift) / scale, 0.0
    for (_, _, stride, padding, pooled), (weight, bias), head in zip(ALEXNET, convolutions, heads):
        pair = F.max_pool2d(pair, 3, 2) if pooled else pair
        pair = F.conv2d(pair, weight.double(), bias.double(), stride, padding).relu()
        unit = pair / (pair.square().sum(1, keepdim=True).sqrt() + 1e-10)
        total += float((head.double() * (unit[:1] - unit[1:]).square()).sum(1).mean())
    return total


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('pyiqa') is None, reason='pyiqa is not installed')
def test_lpips_of_pyiqa(tmp_path):
    """With weights of our own in the folders that the sentences name, against the definition."""
    torch.manual_seed(0)
    network, metric, convolutions, heads, channels = {}, {}, [], [], 3
    for index, place, (width, kernel, *_) in zip(range(5), (0, 3, 6, 8, 10), ALEXNET):
        weight = torch.randn(width, channels, kernel, kernel) * (2 / (channels * kernel**2)) ** 0.5
        convolutions.append((weight, torch.rand(width)))
        heads.append(torch.rand(1, width, 1, 1))
        network[f'features.{place}.weight'], network[f'features.{place}.bias'] = convolutions[-1]
        metric[f'lin{index}.model.1.weight'] = heads[-1]
        channels = width
    for place, shape in ((1, (4096, 9216)), (4, (4096, 4096)), (6, (1000, 4096))):
        network[f'classifier.{place}.weight'] = torch.zeros(1).expand(shape)
        network[f'classifier.{place}.bias'] = torch.zeros(1).expand(shape[0])
    for file, content in zip(iqa_metric.WEIGHTS['lpips'], (network, metric)):
        (tmp_path / 'hub' / file).parent.mkdir(parents=True)
        torch.save(content, tmp_path / 'hub' / file)
    img, img2 = images(80, 96, 3)
    np.save(tmp_path / 'images.npy', np.stack([img, img2]))
    code = (
        'import json, numpy, lora_sr; from lora_sr.basicsr import metrics as m; a, b = numpy.load("images.npy");'
        'print("RESULT", json.dumps([m.calculate_lpips(a, b, 4), m.calculate_lpips(b, b, 4)]))'
    )
    environment = {**python_environment(), 'TORCH_HOME': str(tmp_path), 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, same = json.loads(done.stdout.rpartition('RESULT')[2])
    pair = (torch.from_numpy(x[4:-4, 4:-4, ::-1] / 255.0).permute(2, 0, 1)[None] for x in (img, img2))
    assert found == pytest.approx(lpips(*pair, convolutions, heads), rel=1e-4)
    assert same == 0 and found > 0.01
    assert not os.path.exists(tmp_path / 'hub' / iqa_metric.WEIGHTS['dists'][0])  # nothing was fetched
