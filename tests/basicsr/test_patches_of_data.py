"""The patches of what reads, degrades and averages: the defect, and its repair."""

import io
import os
import shutil
import threading
import types

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.archs import discriminator_arch
from basicsr.data import prefetch_dataloader
from basicsr.losses import basic_loss
from basicsr.models import base_model, build_model, realesrgan_model, realesrnet_model
from basicsr.models.base_model import BaseModel
from basicsr.utils import DiffJPEG, img_process_util, img_util, logger
from basicsr.utils.file_client import LmdbBackend
from basicsr.utils.registry import Registry
from PIL import Image
from scipy import ndimage
from stock_basicsr import MODELS, model, stock

from lora_sr.errors import InputError

# --- databases ---


def test_database_is_shared_within_a_process(pairs):
    path = str(pairs / 'gt.lmdb')
    first, second = LmdbBackend([path], ['gt']), LmdbBackend(path)
    assert first.get('000', 'gt') == second.get('000', 'default')
    with pytest.raises(lmdb.Error):  # what BasicSR does: this is the defect
        lmdb.open(path, readonly=True, lock=False)
    del first, second
    lmdb.open(path, readonly=True, lock=False).close()


@pytest.mark.parametrize('change', ['cut', 'emptied', 'deleted', 'another'])
def test_database_that_changes_while_it_is_read(pairs, tmp_path, change):
    """In a process of its own: to read beyond the end of a mapped file ends it with SIGBUS."""
    shutil.copytree(pairs / 'gt.lmdb', tmp_path / 'gt.lmdb')
    backend = LmdbBackend(str(tmp_path / 'gt.lmdb'))
    file = tmp_path / 'gt.lmdb/data.mdb'
    process = os.fork()
    if not process:
        try:
            whole = backend.get('000', 'default') is not None
            if change == 'deleted':
                file.unlink()
            elif change == 'another':  # as prepare --overwrite does it
                (tmp_path / 'other.mdb').touch()
                (tmp_path / 'other.mdb').replace(file)
            else:
                os.truncate(file, 8192 if change == 'cut' else 0)
            read = backend.get('007', 'default')
            os._exit(0 if whole and read and change in ('deleted', 'another') else 3)
        except InputError as error:
            os._exit(0 if whole and 'is damaged: data.mdb has' in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0


def test_database_that_is_none(tmp_path):
    (tmp_path / 'a.lmdb').mkdir()
    (tmp_path / 'a.lmdb/data.mdb').write_bytes(bytes(8192))
    with pytest.raises(InputError, match='a.lmdb cannot be opened: '):
        LmdbBackend(str(tmp_path / 'a.lmdb'))


# --- batches read ahead ---


def breaks_at(last):
    yield from range(last)
    raise KeyError('type')


def test_error_in_the_thread_that_reads_ahead():
    batches = prefetch_dataloader.PrefetchGenerator(breaks_at(3), 1)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):  # whoever goes on after it does not wait, either
        with pytest.raises(KeyError, match='type'):
            next(batches)


def test_no_batch_after_the_last_one():
    batches = prefetch_dataloader.PrefetchGenerator(iter([0, 1]), 1)
    assert list(batches) == [0, 1] and list(batches) == []


class Loader(list):
    """Batches, and how often somebody began to read them."""

    begun = 0

    def __iter__(self):
        self.begun += 1
        return super().__iter__()


def test_a_loader_is_begun_once():
    """BasicSR's prefetcher begins when it is made and again at the reset: two threads open one dataset at once."""
    for prefetcher, begun in ((stock(prefetch_dataloader, 'CPUPrefetcher'), 2), (prefetch_dataloader.CPUPrefetcher, 1)):
        loader = Loader('ab')
        batches = prefetcher(loader)
        batches.reset()
        assert [batches.next() for _ in range(3)] == ['a', 'b', None] and loader.begun == begun
    assert prefetch_dataloader.CPUPrefetcher(loader).next() == 'a'


class Threads(torch.utils.data.Dataset):
    """Each sample is the thread that reads it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return threading.get_ident()


@pytest.mark.parametrize('workers', [0, 1])
def test_without_workers_no_thread_reads(workers):
    """A thread would draw crops and flips from the random state that the training draws from."""

    loader = prefetch_dataloader.PrefetchDataLoader(1, dataset=Threads(), num_workers=workers)
    batches = iter(loader)
    assert isinstance(batches, prefetch_dataloader.PrefetchGenerator) == bool(workers)
    values = {int(batch) for batch in batches}
    assert workers or values == {threading.get_ident()}


# --- images ---


@pytest.mark.parametrize(('flag', 'mode'), [('color', 'RGB'), ('grayscale', 'L'), ('unchanged', 'RGBA')])
def test_image_that_opencv_does_not_read(flag, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 4, 4), np.uint8), 'RGBA')
    files = {}
    for kind in ('TGA', 'PNG'):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files[kind] = buffer.getvalue()
    assert cv2.imdecode(np.frombuffer(files['TGA'], np.uint8), cv2.IMREAD_COLOR) is None
    expected = np.asarray(image.convert(mode))
    expected = expected if expected.ndim == 2 else expected[..., [2, 1, 0, 3][: expected.shape[2]]]
    assert np.array_equal(img_util.imfrombytes(files['TGA'], flag), expected)
    assert np.array_equal(img_util.imfrombytes(files['TGA'], flag, float32=True), expected.astype(np.float32) / 255)
    theirs = stock(img_util, 'imfrombytes')
    assert np.array_equal(img_util.imfrombytes(files['PNG'], flag), theirs(files['PNG'], flag))


@pytest.mark.parametrize('suffix', ['.png', '.tiff'])
@pytest.mark.parametrize('flag', ['color', 'grayscale', 'unchanged'])
@pytest.mark.parametrize('channels', [1, 3])
def test_image_of_16_bits(suffix, flag, channels):
    image = np.random.default_rng(0).integers(0, 65536, (9, 7, channels), np.uint16)
    file, theirs = cv2.imencode(suffix, image)[1].tobytes(), stock(img_util, 'imfrombytes')
    values = img_util.imfrombytes(file, flag, float32=True)
    assert values.dtype == np.float32
    if flag != 'grayscale' or channels == 1:
        expected = image.astype(np.float64) / 65535
        expected = np.dstack([expected] * 3) if flag == 'color' and channels == 1 else expected
        assert np.array_equal(values, expected.reshape(values.shape).astype(np.float32))
    if flag != 'unchanged':  # of which BasicSR takes 255 for white
        before = theirs(file, flag, float32=True)
        assert before.shape == values.shape and 0 < np.abs(before - values).max() < 1.01 / 255  # the defect
    # Whole numbers are as they were.
    assert np.array_equal(img_util.imfrombytes(file, flag), theirs(file, flag))
    # An image of 8 bits that is stored in 16 is the same image.
    small = np.random.default_rng(1).integers(0, 256, (9, 7, channels), np.uint8)
    stored = cv2.imencode(suffix, 257 * small.astype(np.uint16))[1].tobytes()
    of_8_bits = img_util.imfrombytes(cv2.imencode(suffix, small)[1].tobytes(), flag, float32=True)
    found = img_util.imfrombytes(stored, flag, float32=True)
    assert np.array_equal(found, of_8_bits) or (flag == 'grayscale' and np.abs(found - of_8_bits).max() < 1 / 255)


@pytest.mark.parametrize(
    ('content', 'reason'), [(b'', 'missing, or empty'), (None, 'missing'), (b'no image', 'damaged')]
)
def test_what_is_no_image(content, reason):
    with pytest.raises(InputError, match=f'an image is {reason}'):
        img_util.imfrombytes(content, float32=True)


# --- averages, degrading on the fly, perceptual loss ---


def average(decay: float, steps: int, model_ema, start_equal: bool = True) -> tuple:
    """A network with one frozen tensor, and its average after some steps in which the other one grows by 1."""
    one = model(dist=False)
    torch.manual_seed(0)
    one.net_g, one.net_g_ema = torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)
    if start_equal:
        one.net_g_ema.load_state_dict(one.net_g.state_dict())
    one.net_g.weight.requires_grad = False
    for _ in range(steps):
        one.net_g.bias.data += 1
        model_ema(one, decay)
    return one.net_g, one.net_g_ema


def test_average_keeps_what_is_frozen():
    stock_ema = vars(stock(base_model, 'BaseModel'))['model_ema']
    network, theirs = average(0.999, 100, stock_ema)
    assert not torch.equal(theirs.weight, network.weight)  # the defect
    network, ours = average(0.999, 100, BaseModel.model_ema)
    assert torch.equal(ours.weight, network.weight)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-6, atol=0)
    network, copied = average(0, 1, BaseModel.model_ema, start_equal=False)  # how BasicSR starts an average
    assert torch.equal(copied.weight, network.weight) and torch.equal(copied.bias, network.bias)


@pytest.fixture
def stock_module(monkeypatch):
    """A class of BasicSR as its file has it, though the registry has one of its name already."""
    monkeypatch.setattr(Registry, '_do_register', lambda *args, **kwargs: None)
    return stock


TINY_NETWORK = {'type': 'MSRResNet', 'num_feat': 2, 'num_block': 1, 'upscale': 2}


def plain_options(**changes) -> dict:
    base = {'num_gpu': 0, 'is_train': False, 'dist': False, 'path': {}, 'network_g': TINY_NETWORK, 'rank': 0}
    return {**base, **changes}


@pytest.fixture
def no_gpu(monkeypatch):
    """Nothing may ask for a GPU, on a machine that has one as well."""

    def cuda(self, *args, **kwargs):
        raise AssertionError('.cuda() was called')

    monkeypatch.setattr(torch.Tensor, 'cuda', cuda)
    monkeypatch.setattr(torch.nn.Module, 'cuda', cuda)


@pytest.mark.parametrize(('module', 'name'), MODELS)
def test_degradations_are_on_the_device_of_the_model(stock_module, no_gpu, module, name):
    with pytest.raises(AssertionError, match='cuda'):
        stock_module(module, name)(plain_options())
    one = build_model(plain_options(model_type=name, queue_size=6))
    assert one.queue_size == 6 and build_model(plain_options(model_type=name)).queue_size == 180
    for part in (one.jpeger, one.usm_sharpener):
        assert {value.device.type for value in part.state_dict().values()} == {'cpu'}


@pytest.mark.parametrize(('module', 'name'), MODELS)
def test_pool_of_pairs_is_as_before(stock_module, monkeypatch, module, name):
    """The same pairs come out of it in the same order; the stock one is made to stay on the CPU."""
    theirs = vars(stock_module(module, name))['_dequeue_and_enqueue']
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda tensor: tensor)
    pairs = [(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8, 8)) for _ in range(9)]
    drawn = []
    for dequeue in (theirs, vars(getattr(module, name))['_dequeue_and_enqueue']):
        torch.manual_seed(0)
        one = types.SimpleNamespace(queue_size=6)
        drawn.append([])
        for one.lq, one.gt in pairs:
            dequeue(one)
            drawn[-1].append((one.lq, one.gt))
    for step, (stock_pair, pair) in enumerate(zip(*drawn)):
        assert all(torch.equal(one, other) for one, other in zip(stock_pair, pair))
        assert torch.equal(pair[0], pairs[step][0]) == (step < 3)  # while the pool fills, pairs go straight through


@pytest.mark.parametrize(('module', 'name'), MODELS)
def test_pool_of_no_whole_batches(no_gpu, module, name):
    one = types.SimpleNamespace(queue_size=5, lq=torch.rand(2, 3, 4, 4), gt=torch.rand(2, 3, 8, 8))
    with pytest.raises(AssertionError, match='queue size 5 should be divisible by batch size 2'):
        getattr(module, name)._dequeue_and_enqueue(one)


def test_filter_of_images_with_their_channels_last():
    """As ``DiffJPEG`` gives them. A kernel for each image, against SciPy."""
    torch.manual_seed(0)
    images, kernels = torch.rand(2, 3, 30, 40), torch.rand(2, 5, 5)
    compressed = DiffJPEG(differentiable=False)(images, quality=torch.tensor([40.0, 90.0])).detach()
    with pytest.raises(RuntimeError, match='view size is not compatible'):
        stock(img_process_util, 'filter2D')(compressed, kernels)
    found = img_process_util.filter2D(compressed, kernels)
    for image, kernel, result in zip(compressed.double().numpy(), kernels.double().numpy(), found.numpy()):
        expected = np.stack([ndimage.correlate(channel, kernel, mode='mirror') for channel in image])
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert realesrgan_model.filter2D is realesrnet_model.filter2D is img_process_util.filter2D


def test_discriminator_of_images_with_their_channels_last(stock_module):
    """As SwinIR gives them on a CPU."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 128, 128)
    last = images.contiguous(memory_format=torch.channels_last)
    theirs = stock_module(discriminator_arch, 'VGGStyleDiscriminator')(3, 2)
    ours = discriminator_arch.VGGStyleDiscriminator(3, 2)
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match='view size is not compatible'):
        theirs(last)
    torch.testing.assert_close(ours(last), theirs(images))


def test_squared_criterion_of_the_perceptual_loss(stock_module, monkeypatch):
    class Features(torch.nn.Module):
        def __init__(self, **kwargs):
            super().__init__()

        def forward(self, image):
            return {'conv1_1': image, 'conv2_1': 2 * image}

    monkeypatch.setattr(basic_loss, 'VGGFeatureExtractor', Features)
    theirs = stock_module(basic_loss, 'PerceptualLoss')
    theirs.__init__.__globals__['VGGFeatureExtractor'] = Features
    with pytest.raises(AttributeError, match='L2loss'):
        theirs({'conv1_1': 1.0}, criterion='l2')
    image, target = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    layers = {'conv1_1': 0.5, 'conv2_1': 1.0}
    for criterion, expected in (
        ('l2', 4.5 * (image - target).square().mean()),
        ('l1', 2.5 * (image - target).abs().mean()),
        ('fro', 2.5 * (image - target).square().sum().sqrt()),
    ):
        loss, style = basic_loss.PerceptualLoss(layers, perceptual_weight=3.0, criterion=criterion)(image, target)
        torch.testing.assert_close(loss, 3 * expected)
        assert style is None


def test_a_loader_is_validated_once_for_an_iteration(monkeypatch):
    """`train_pipeline` does it once more at its end."""
    seen = []
    monkeypatch.setattr(BaseModel, 'nondist_validation', lambda self, *values: seen.append(values[:2]), raising=False)
    one, first, second = model(), [1], [2]
    for loader, iteration in ((first, 4), (second, 4), (first, 4), (second, 4), (first, 5)):
        one.validation(loader, iteration, None)
    assert seen == [([1], 4), ([2], 4), ([1], 5)]
    seen.clear()
    tested = model(is_train=False)
    for _ in range(2):
        tested.validation(first, 'name', None)
    assert len(seen) == 2


def test_no_time_is_left_after_the_last_iteration():
    options = {'name': 'a', 'logger': {'print_freq': 1, 'use_tb_logger': False}, 'train': {'total_iter': 6}}
    assert logger.MessageLogger(options).max_iters == stock(logger, 'MessageLogger')(options).max_iters + 1
