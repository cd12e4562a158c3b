"""Each patch of BasicSR: the defect, its repair, and that what is not defective is left alone."""

import copy
import io
import math
import os
import subprocess
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import discriminator_arch
from basicsr.data import prefetch_dataloader
from basicsr.losses import basic_loss
from basicsr.models import base_model, build_model, realesrgan_model, realesrnet_model
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import MultiStepRestartLR
from basicsr.models.sr_model import SRModel
from basicsr.utils import DiffJPEG, dist_util, img_process_util, img_util, logger, misc, options
from basicsr.utils.file_client import LmdbBackend
from basicsr.utils.registry import Registry
from PIL import Image
from scipy import ndimage
from tiny_run import REPOSITORY

import lora_sr
from lora_sr import files, hook
from lora_sr.basicsr import patches
from lora_sr.basicsr.metrics import is_less_better
from lora_sr.basicsr.patches.optimizers import optimizer_registry
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import InputError
from lora_sr.files import save_atomically
from lora_sr.images.decoding import decode
from lora_sr.option_file import OptionLoader, apply_overrides, load_options


def run_python(*arguments, cwd, path=REPOSITORY):
    """Run Python in a process of its own, with the package importable, on one thread."""
    environment = dict(os.environ, PYTHONPATH=str(path), OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    for name in ('RANK', 'WORLD_SIZE'):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def stock(module, name):
    """A function as BasicSR's file has it: its source, run again where the patches do not reach."""
    namespace = dict(vars(module))
    namespace['__name__'] = 'stock'
    with open(module.__file__, encoding='utf-8') as file:
        exec(compile(file.read(), module.__file__, 'exec'), namespace)
    return namespace[name]


@pytest.fixture
def stock_methods(monkeypatch):
    """BaseModel with BasicSR's own methods in place of the patched ones, for the length of a test."""
    original = stock(base_model, 'BaseModel')
    for name in ('get_optimizer', 'load_network', 'save_network', 'save_training_state', 'model_to_device'):
        monkeypatch.setattr(BaseModel, name, vars(original)[name])


def model(folder=None, **opt):
    base = {'num_gpu': 0, 'is_train': True, 'dist': False}
    return BaseModel(dict(base, path={'models': str(folder), 'training_states': str(folder)}, **opt))


# --- import ---


@pytest.mark.slow
def test_basicsr_needs_the_import_patch(tmp_path):
    """BasicSR alone cannot be imported with a torchvision that has no functional_tensor; after lora_sr it can."""
    code = 'import importlib.util as u, sys; sys.exit(u.find_spec("torchvision.transforms.functional_tensor") is None)'
    defective = run_python('-c', code, cwd=tmp_path).returncode == 1
    assert (run_python('-c', 'import basicsr', cwd=tmp_path).returncode != 0) == defective
    assert run_python('-c', 'import lora_sr, basicsr.data.degradations', cwd=tmp_path).returncode == 0


def test_import_patch_leaves_an_existing_module(monkeypatch):
    present = types.ModuleType('present')
    monkeypatch.setitem(sys.modules, 'torchvision.transforms.functional_tensor', present)
    hook.patch_torchvision_import()
    assert sys.modules['torchvision.transforms.functional_tensor'] is present


def test_apply_again_changes_nothing():
    def state():
        methods = [vars(BaseModel)[name] for name in ('get_optimizer', 'load_network', 'save_network')]
        return [*methods, BaseModel.model_to_device, LmdbBackend.__init__, options.parse_options, misc.check_resume,
                options.ordered_yaml, dist_util._init_dist_pytorch, dist_util._init_dist_slurm,
                BaseModel.model_ema, img_process_util.filter2D, basic_loss.PerceptualLoss.__init__,
                discriminator_arch.VGGStyleDiscriminator.forward,
                *(vars(getattr(module, name))['__init__'] for module, name in MODELS),
                *(vars(getattr(module, name))['_dequeue_and_enqueue'] for module, name in MODELS)]  # fmt: skip

    before = state()
    patches.apply()
    assert all(one is other for one, other in zip(before, state()))


# --- optimizers ---


def test_stock_optimizer_is_adam_alone(stock_methods):
    with pytest.raises(NotImplementedError):
        model().get_optimizer('AdamW', [torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    patches.optimizers.patch_get_optimizer()
    assert isinstance(model().get_optimizer('AdamW', [torch.nn.Parameter(torch.zeros(1))], lr=1e-3), torch.optim.AdamW)


@pytest.mark.parametrize('name', ['Adam', 'AdamW', 'SGD', 'RAdam', 'NAdam', 'Adagrad', 'Rprop', 'LBFGS'])
def test_optimizers_of_torch(name):
    optimizer = model().get_optimizer(name, [torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]['lr'] == 2e-3


def test_optimizer_errors():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(InputError, match="no optimizer 'AdmaW'; did you mean AdamW"):
        model().get_optimizer('AdmaW', parameters, lr=1e-3)
    with pytest.raises(InputError, match='SGD takes no betas; its options are lr, momentum'):
        model().get_optimizer('SGD', parameters, lr=1e-3, betas=[0.9, 0.99])
    with pytest.raises(InputError, match='SGD cannot be set up with lr=-1'):
        model().get_optimizer('SGD', parameters, lr=-1)


def test_registered_optimizer_comes_first(monkeypatch):
    class Adam(torch.optim.SGD):
        pass

    monkeypatch.setitem(optimizer_registry()._obj_map, 'Adam', Adam)
    assert type(model().get_optimizer('Adam', [torch.nn.Parameter(torch.zeros(1))], lr=1e-3)) is Adam


# --- databases ---


def test_database_is_shared_within_a_process(pairs):
    path = str(pairs / 'gt.lmdb')
    first, second = LmdbBackend([path], ['gt']), LmdbBackend(path)
    assert first.get('000', 'gt') == second.get('000', 'default')
    with pytest.raises(lmdb.Error):  # what BasicSR does: this is the defect
        lmdb.open(path, readonly=True, lock=False)
    del first, second
    lmdb.open(path, readonly=True, lock=False).close()


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


@pytest.mark.parametrize('workers', [0, 1])
def test_without_workers_no_thread_reads(workers):
    """A thread would draw crops and flips from the random state that the training draws from."""

    class Threads(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return threading.get_ident()

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


@pytest.mark.parametrize(
    ('content', 'reason'), [(b'', 'missing, or empty'), (None, 'missing'), (b'no image', 'damaged')]
)
def test_what_is_no_image(content, reason):
    with pytest.raises(InputError, match=f'an image is {reason}'):
        img_util.imfrombytes(content, float32=True)


# --- option files ---


def test_yaml_tag_does_not_run_code(tmp_path):
    text = "name: x\nlr: 1e-4\nbad: !!python/object/apply:os.system ['touch {}']\n"
    stock_loader = stock(options, 'ordered_yaml')()[0]
    yaml.load(text.format(tmp_path / 'stock'), Loader=stock_loader)
    assert (tmp_path / 'stock').exists()  # the defect

    file = tmp_path / 'bad.yml'
    file.write_text(text.format(tmp_path / 'ours'))
    with pytest.raises(InputError, match="bad.yml, line 3: the tag '!!python/object/apply:os.system' is refused"):
        load_options(file)
    with pytest.raises(yaml.YAMLError):
        yaml.load(file.read_text(), Loader=options.ordered_yaml()[0])
    assert not (tmp_path / 'ours').exists()


def test_option_file_values(tmp_path):
    file = tmp_path / 'good.yml'
    file.write_text(
        'a: 1e-4\nb: !!float 5e-4\nc: 1e6\nd: !!python/tuple [1, 2]\ne: ~\nf: &x {k: 1}\ng: {<<: *x, l: 2}\n'
    )
    opt = load_options(file)
    assert list(opt) == list('abcdefg')
    assert (opt['a'], opt['b'], opt['c'], opt['d'], opt['e'], opt['g']) == (
        1e-4, 5e-4, 1e6, (1, 2), None, {'k': 1, 'l': 2})  # fmt: skip


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('a: [1\nb: 2\n', 'line 2: did not find expected'),
        ('a: 1\nb:\n  c: 1\n  c: 2\n', "line 4: the key 'c' is given twice"),
        ('- a\n', 'holds no options'),
        ('', 'holds no options'),
        ('a: !!float ten\n', 'could not convert'),
    ],
)
def test_wrong_option_file(tmp_path, text, sentence):
    (tmp_path / 'bad.yml').write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_options(tmp_path / 'bad.yml')


def test_option_file_that_is_no_text(tmp_path):
    (tmp_path / 'bad.yml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(InputError, match='not a text file'):
        load_options(tmp_path / 'bad.yml')
    with pytest.raises(InputError, match='none.yml cannot be read: No such file'):
        load_options(tmp_path / 'none.yml')


def test_overrides():
    opt = {'train': {'lr': 1, 'betas': [1], 'x': 0}, 'name': 'n'}
    apply_overrides(opt, ['train:lr=1e-4', 'train:betas=[0.9, 0.99]', 'train:x=none', 'name=a=b'])
    assert opt == {'train': {'lr': 1e-4, 'betas': [0.9, 0.99], 'x': None}, 'name': 'a=b'}


@pytest.mark.parametrize(
    ('entry', 'sentence'),
    [
        ('train:lrs=1', "'train' has no key 'lrs'; the keys there are lr, betas"),
        ('trian:lr=1', "the option file has no key 'trian'; the keys there are train, name"),
        ('name:x=1', "'name' is a single value"),
        ('name', "there is no '='"),
        ('name=!!python/name:os.getcwd', "the tag '!!python/name:os.getcwd' is refused"),
        ('name"]=__import__("os").getcwd() #=1', 'the option file has no key'),
    ],
)
def test_wrong_override(entry, sentence):
    opt = {'train': {'lr': 1, 'betas': 2}, 'name': 'n'}
    with pytest.raises(InputError, match=sentence):
        apply_overrides(opt, ['train:lr=5', entry])
    assert opt == {'train': {'lr': 1, 'betas': 2}, 'name': 'n'}


def test_parse_options(tiny_options, monkeypatch):
    argv = ['train.py', '-opt', str(tiny_options), '--force_yml', 'manual_seed=7', 'train:optim_g:lr=2e-3', '--debug']
    monkeypatch.setattr(sys, 'argv', argv)
    opt, args = options.parse_options('/root', is_train=True)
    assert sys.argv is argv
    assert (opt['manual_seed'], opt['train']['optim_g']['lr'], opt['name']) == (7, 2e-3, 'debug_tiny')
    assert torch.initial_seed() == 7  # in BasicSR, --force_yml comes too late for the seed
    assert args.force_yml == argv[4:6]
    assert options.ordered_yaml()[0] is OptionLoader


def test_stock_parse_options_runs_code(tiny_options, monkeypatch, tmp_path):
    """The defect that ``patch_parse_options`` is there for."""
    entry = f'train:optim_g=[__import__("pathlib").Path("{tmp_path}/ran").touch()]'
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(tiny_options), '--force_yml', entry])
    monkeypatch.setenv('LORA_SR_CHECK', '0')  # which would tell that this is no optimizer
    stock(options, 'parse_options')('/root')
    assert (tmp_path / 'ran').exists()
    (tmp_path / 'ran').unlink()
    options.parse_options('/root')
    assert not (tmp_path / 'ran').exists()


# --- distributed runs ---


def test_stock_start_needs_a_gpu(monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    started = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: started.append(backend))
    with pytest.raises(ZeroDivisionError):
        stock(dist_util, '_init_dist_pytorch')('gloo')
    dist_util._init_dist_pytorch('gloo')
    patches.distributed.start_distributed('pytorch', {'num_gpu': 0, 'dist_params': {'backend': 'gloo', 'port': 29500}})
    assert started == ['gloo', 'gloo']
    with pytest.raises(InputError, match='backend must be gloo for a run on CPUs, got nccl'):
        patches.distributed.start_distributed('pytorch', {'num_gpu': 0})


def test_slurm_start(monkeypatch, tmp_path):
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho node7\necho node8\n')
    (tmp_path / 'scontrol').chmod(0o755)
    given = {'SLURM_PROCID': '3', 'SLURM_NTASKS': '4', 'SLURM_NODELIST': 'node[7-8]',
             'PATH': f'{tmp_path}:{os.environ["PATH"]}'}  # fmt: skip
    for name in ('MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'LOCAL_RANK', 'RANK'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    started = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: started.append(backend))
    patches.distributed.start_distributed('slurm', {'num_gpu': 0, 'dist_params': {'backend': 'gloo', 'port': 29511}})
    found = {name: os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'LOCAL_RANK', 'RANK')}
    assert started == ['gloo']
    assert found == {'MASTER_ADDR': 'node7', 'MASTER_PORT': '29511', 'WORLD_SIZE': '4', 'LOCAL_RANK': '0', 'RANK': '3'}


# --- reading and writing ---


def test_training_state_with_a_counter_can_be_read(tmp_path):
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(net.parameters())
    scheduler = MultiStepRestartLR(optimizer, milestones=[2])
    state = {'epoch': 0, 'iter': 1, 'optimizers': [optimizer.state_dict()], 'schedulers': [scheduler.state_dict()]}
    save_atomically(state, tmp_path / '1.state')
    assert read_checkpoint(tmp_path / '1.state')['schedulers'][0]['milestones'] == Counter([2])


def test_patch_of_training_state_types_where_they_are_refused(monkeypatch):
    allowed = []
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError('refused')))
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', allowed.extend, raising=False)
    patches.resume.patch_training_state_types()
    assert allowed == [Counter]


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrong_checkpoints(tmp_path):
    net, path = torch.nn.Linear(2, 2), tmp_path / 'x.pth'
    with pytest.raises(InputError, match='none.pth cannot be read: No such file'):
        model().load_network(net, str(tmp_path / 'none.pth'))
    path.write_bytes(b'PK no checkpoint')
    with pytest.raises(InputError, match='x.pth is damaged'):
        model().load_network(net, str(path))
    torch.save({'params': Touch(str(tmp_path / 'ran'))}, path)
    with pytest.raises(InputError, match='x.pth is damaged, or holds more'):
        model().load_network(net, str(path))
    assert not (tmp_path / 'ran').exists()
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(InputError, match="has no 'params'; its keys begin with weight, bias"):
        model().load_network(net, str(path))
    torch.save({'params': torch.nn.Linear(3, 2).state_dict()}, path)
    with pytest.raises(InputError, match=r'does not fit Linear: weight has shape \(2, 3\) instead of \(2, 2\)'):
        model().load_network(net, str(path))
    torch.save({'params': {'bias': net.bias.data, 'w': net.bias.data}}, path)
    with pytest.raises(InputError, match=r'1 keys are missing \(the first is weight\), 1 keys are not known to it'):
        model().load_network(net, str(path))


def test_load_network(tmp_path):
    source, net, path = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), tmp_path / 'x.pth'
    torch.save({'params': {f'module.{key}': value for key, value in source.state_dict().items()}}, path)
    model().load_network(net, str(path), param_key='params_ema')  # BasicSR's habit: params in place of params_ema
    assert torch.equal(net.weight, source.weight)
    torch.save({'weight': source.weight.data * 2, 'bias': torch.zeros(3)}, path)
    model().load_network(net, str(path), strict=False, param_key=None)
    assert torch.equal(net.weight, source.weight * 2)


def test_stock_saving_ignores_failures(stock_methods, monkeypatch, tmp_path):
    monkeypatch.setattr(files.time, 'sleep', lambda seconds: None)
    missing = tmp_path / 'missing'
    model(missing).save_training_state(0, 5)  # the defect: no word of it
    patches.checkpoints.patch_saving()
    for save in (
        lambda: model(missing).save_training_state(0, 5),
        lambda: model(missing).save_network(torch.nn.Linear(1, 1), 'net_g', 5),
    ):
        with pytest.raises(InputError, match='missing/.* cannot be written'):
            save()
    assert not missing.exists()


def test_interrupted_writing_keeps_the_file(monkeypatch, tmp_path):
    path, written = tmp_path / 'x.pth', []
    save_atomically({'a': 1}, path)
    complete = path.read_bytes()

    def full_disk(content, file):
        Path(file).write_bytes(b'half')
        written.append(file)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    monkeypatch.setattr(files, 'SAVE_PAUSE', 0)
    with pytest.raises(InputError, match='x.pth cannot be written: No space left on device'):
        save_atomically({'a': 2}, path)
    assert len(written) == files.SAVE_ATTEMPTS
    assert path.read_bytes() == complete
    assert os.listdir(tmp_path) == ['x.pth']


def test_saved_files_are_as_before(stock_methods, tmp_path):
    net = torch.nn.Linear(2, 2)
    for folder in ('stock', 'ours'):
        (tmp_path / folder).mkdir()
        one = model(tmp_path / folder)
        one.save_network([net, net], 'net_g', -1, param_key=['params', 'params_ema'])
        one.save_training_state(1, 2)
        one.save_training_state(1, -1)
        patches.checkpoints.patch_saving()
    for name in ('net_g_latest.pth', '2.state'):
        ours, theirs = (read_checkpoint(tmp_path / folder / name) for folder in ('ours', 'stock'))
        assert ours.pop('lora_sr')['version'] == lora_sr.__version__  # where it comes from
        assert str(ours) == str(theirs)
    assert sorted(os.listdir(tmp_path / 'ours')) == ['2.state', 'net_g_latest.pth']


# --- resuming ---


def resume_options(tmp_path, **path):
    for name in ('models', 'training_states'):
        (tmp_path / name).mkdir(exist_ok=True)
    state = {'epoch': 3, 'iter': 20, 'optimizers': [], 'schedulers': []}
    for iteration in (8, 20, 100):
        torch.save(dict(state, iter=iteration), tmp_path / 'training_states' / f'{iteration}.state')
    torch.save({}, tmp_path / 'models' / 'net_g_100.pth')
    folders = {name: str(tmp_path / name) for name in ('models', 'training_states')}
    return {'auto_resume': True, 'network_g': {}, 'network_t': {}, 'path': {**folders, **path}}


def test_resume_keeps_the_teacher(tmp_path):
    teacher = {'pretrain_network_t': 'teacher.pth', 'param_key_t': 'params_ema', 'param_key_g': 'params_ema'}
    opt = resume_options(tmp_path, pretrain_network_g='base.pth', **teacher)
    state = patches.resume.load_resume_state(opt)
    assert state['iter'] == 100
    assert opt['path']['resume_state'] == str(tmp_path / 'training_states' / '100.state')
    assert opt['path']['pretrain_network_g'] == str(tmp_path / 'models' / 'net_g_100.pth')
    assert (opt['path']['pretrain_network_t'], opt['path']['param_key_t']) == ('teacher.pth', 'params_ema')
    assert opt['path']['param_key_g'] == 'params'

    # A start from a plain state dict (~) is over once the run has files of its own.
    opt = resume_options(tmp_path, pretrain_network_g='base.pth', **{**teacher, 'param_key_g': None})
    patches.resume.load_resume_state(opt)
    assert opt['path']['param_key_g'] == 'params'

    opt = resume_options(tmp_path, resume_state='x', **teacher)
    stock(misc, 'check_resume')(opt, 100)
    assert not Path(opt['path']['pretrain_network_t']).exists()  # the defect


def test_resume_without_its_network(tmp_path):
    opt = resume_options(
        tmp_path, pretrain_network_g='base.pth', resume_state=str(tmp_path / 'training_states/8.state')
    )
    opt['auto_resume'] = False
    with pytest.raises(InputError, match='cannot be resumed at iteration 8: .*net_g_8.pth is missing'):
        patches.resume.load_resume_state(opt)


def test_wrong_training_state(tmp_path):
    opt = resume_options(tmp_path, resume_state=str(tmp_path / 'models/net_g_100.pth'))
    opt['auto_resume'] = False
    with pytest.raises(InputError, match='is not a training state: it has no epoch, iter'):
        patches.resume.load_resume_state(opt)


def test_nothing_to_resume(tmp_path):
    path = {'training_states': str(tmp_path / 'none')}
    assert patches.resume.load_resume_state({'auto_resume': True, 'path': path}) is None
    assert patches.resume.load_resume_state({'auto_resume': False, 'path': path}) is None


def test_load_resume_state_of_a_script_is_replaced(monkeypatch):
    script = types.ModuleType('script')
    exec('def load_resume_state(opt):\n    return torch.cuda.current_device()', vars(script))
    good = types.ModuleType('good')
    exec('def load_resume_state(opt):\n    return 1', vars(good))
    monkeypatch.setitem(sys.modules, 'script', script)
    monkeypatch.setitem(sys.modules, 'good', good)
    patches.resume.patch_load_resume_state()
    assert script.load_resume_state is patches.resume.load_resume_state
    assert good.load_resume_state({}) == 1


@pytest.mark.slow
@pytest.mark.parametrize('place', ['first', 'last'])
def test_training_script_of_a_clone(place, tiny_options, tmp_path):
    """BasicSR's own train.py with the one line ``import lora_sr``, interrupted and resumed without a GPU."""
    from basicsr import train

    source = Path(train.__file__).read_text(encoding='utf-8')
    if place == 'first':
        source = 'import lora_sr\n' + source
    else:
        # Without the patch BasicSR's imports may not get that far: a clone that does has repaired its own.
        source = SHIM + source.replace('\n\ndef init_tb_loggers', '\nimport lora_sr\n\ndef init_tb_loggers', 1)
    script = tmp_path / 'basicsr' / 'train.py'
    script.parent.mkdir()
    script.write_text(source, encoding='utf-8')
    command = [script, '-opt', tiny_options, '--auto_resume']
    first = run_python(*command, '--force_yml', 'train:total_iter=4', cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run_python(*command, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert 'Resuming training from epoch: 0, iter: 4.' in second.stderr
    assert 'iter:       5, lr:(5.000e-04,)' in second.stderr
    assert (tmp_path / 'experiments/tiny/training_states/6.state').is_file()


SHIM = """\
import sys
import threading
import types
import torchvision.transforms.functional as functional
sys.modules.setdefault('torchvision.transforms.functional_tensor', functional)
"""


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
    assert torch.equal(ours.bias, theirs.bias)
    network, copied = average(0, 1, BaseModel.model_ema, start_equal=False)  # how BasicSR starts an average
    assert torch.equal(copied.weight, network.weight) and torch.equal(copied.bias, network.bias)


@pytest.fixture
def stock_module(monkeypatch):
    """A class of BasicSR as its file has it, though the registry has one of its name already."""
    monkeypatch.setattr(Registry, '_do_register', lambda *args, **kwargs: None)
    return stock


MODELS = [(realesrnet_model, 'RealESRNetModel'), (realesrgan_model, 'RealESRGANModel')]
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


# --- what a later BasicSR may have repaired itself ---


class Good:
    """Functions of BasicSR without the defects, as far as the patches look at them."""

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        return getattr(torch.optim, optim_type)(params, lr, **kwargs)

    def load_network(self, net, load_path, strict=True, param_key='params'):
        net.load_state_dict(torch.load(load_path, weights_only=True)[param_key], strict=strict)

    def save_network(self, net, net_label, current_iter, param_key='params'):
        torch.save({param_key: net.state_dict()}, 'new')
        os.replace('new', net_label)

    def save_training_state(self, epoch, current_iter):
        torch.save({'epoch': epoch}, 'new')
        os.replace('new', f'{current_iter}.state')

    def model_to_device(self, net):
        return net.to(torch.cuda.current_device() if self.device.type == 'cuda' else 'cpu')

    def resume_training(self, resume_state):
        for optimizer, state in zip(self.optimizers, resume_state['optimizers']):
            if len(optimizer.param_groups[0]['betas']) == len(state['param_groups'][0]['betas']):
                optimizer.load_state_dict(state)

    def _print_different_keys_loading(self, crt_net, load_net, strict=True):
        pass

    def model_ema(self, decay=0.999):
        for own, average in zip(self.net_g.parameters(), self.net_g_ema.parameters()):
            average.data.mul_(decay if own.requires_grad else 1)

    def init_training_settings(self):
        self.net_g_ema = copy.deepcopy(self.net_g)
        self.setup_schedulers()

    def setup_optimizers(self):
        self.optimizers = [torch.optim.Adam(value for value in self.net_g.parameters() if value.requires_grad)]

    def degrade(self, opt):
        self.jpeger = DiffJPEG(differentiable=False).to(self.device)

    def _dequeue_and_enqueue(self):
        self.queue_lr = torch.zeros(1, device=self.device)

    def open_database(self, db_paths):
        self.db_paths = db_paths

    def perceptual_loss(self, layer_weights, criterion='l1'):
        self.criterion = {'l1': torch.nn.L1Loss, 'l2': torch.nn.MSELoss}[criterion]()

    def forward(self, x):
        return self.linear2(self.linear1(x.flatten(1)))

    def run(self):
        try:
            self.queue.put(next(self.generator))
        except BaseException as error:
            self.queue.put(error)

    def begin_later(self, loader):
        self.ori_loader = loader

    def _initialize_best_metric_results(self, dataset_name):
        better = 'lower' if is_less_better(dataset_name) else 'higher'
        self.best_metric_results = {dataset_name: {'better': better}}

    def reduce_loss_dict(self, loss_dict):
        return {name: value.item() for name, value in loss_dict.items() if math.isfinite(value)}

    def message_logger(self, opt, start_iter=1, tb_logger=None):
        self.last = opt['train']['total_iter']

    @staticmethod
    def filter2D(img, kernel):
        return img.contiguous().view(1, -1) * kernel

    @staticmethod
    def _init_dist_pytorch(backend, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['RANK']) % torch.cuda.device_count())

    @staticmethod
    def imfrombytes(content, flag='color', float32=False):
        return decode(content)

    @staticmethod
    def check_resume(opt, resume_iter):
        opt['path']['pretrain_network_g'] = f'net_g_{resume_iter}.pth'

    @staticmethod
    def ordered_yaml():
        return yaml.SafeLoader, yaml.SafeDumper


NET, GAN = realesrnet_model.RealESRNetModel, realesrgan_model.RealESRGANModel
LEFT_ALONE = [
    (patches.optimizers.patch_get_optimizer, [(BaseModel, 'get_optimizer')]),
    (patches.checkpoints.patch_load_network, [(BaseModel, 'load_network')]),
    (patches.checkpoints.patch_saving, [(BaseModel, 'save_network'), (BaseModel, 'save_training_state')]),
    (patches.checkpoints.patch_frozen_warnings, [(SRModel, 'setup_optimizers')]),
    (patches.checkpoints.patch_missing_lora_warnings, [(BaseModel, '_print_different_keys_loading')]),
    (patches.distributed.patch_model_to_device, [(BaseModel, 'model_to_device')]),
    (
        patches.distributed.patch_distributed_start,
        [(dist_util, '_init_dist_pytorch'), (dist_util, '_init_dist_slurm', '_init_dist_pytorch')],
    ),
    (patches.resume.patch_resume_training, [(BaseModel, 'resume_training')]),
    (patches.resume.patch_check_resume, [(misc, 'check_resume')]),
    (patches.average.patch_average_of_frozen, [(BaseModel, 'model_ema')]),
    (
        patches.degradations.patch_degradation_device,
        [
            (NET, '__init__', 'degrade'),
            (GAN, '__init__', 'degrade'),
            (NET, '_dequeue_and_enqueue'),
            (GAN, '_dequeue_and_enqueue'),
        ],
    ),
    (
        patches.degradations.patch_views,
        [(img_process_util, 'filter2D'), (discriminator_arch.VGGStyleDiscriminator, 'forward')],
    ),
    (patches.lmdb.patch_lmdb_backend, [(LmdbBackend, '__init__', 'open_database')]),
    (patches.prefetch.patch_prefetch_thread, [(prefetch_dataloader.PrefetchGenerator, 'run')]),
    (
        patches.prefetch.patch_prefetchers,
        [
            (prefetch_dataloader.CPUPrefetcher, '__init__', 'begin_later'),
            (prefetch_dataloader.CUDAPrefetcher, '__init__', 'begin_later'),
        ],
    ),
    (patches.images.patch_imfrombytes, [(img_util, 'imfrombytes')]),
    (patches.validation.patch_best_metrics, [(BaseModel, '_initialize_best_metric_results')]),
    (patches.divergence.patch_reduce_loss_dict, [(BaseModel, 'reduce_loss_dict')]),
    (patches.messages.patch_remaining_time, [(logger.MessageLogger, '__init__', 'message_logger')]),
    (patches.losses.patch_perceptual_criterion, [(basic_loss.PerceptualLoss, '__init__', 'perceptual_loss')]),
    (patches.options.patch_ordered_yaml, [(options, 'ordered_yaml')]),
]


@pytest.mark.parametrize(('apply', 'places'), LEFT_ALONE, ids=lambda value: getattr(value, '__name__', ''))
def test_what_is_not_defective_is_left_alone(apply, places, monkeypatch):
    for owner, name, *other in places:
        monkeypatch.setattr(owner, name, getattr(Good, other[0] if other else name))
    apply()
    for owner, name, *other in places:
        assert vars(owner)[name] is getattr(Good, other[0] if other else name)


def test_an_average_that_is_copied_is_left_alone(monkeypatch):
    scheduled = vars(stock(base_model, 'BaseModel'))['setup_schedulers']
    monkeypatch.setattr(BaseModel, 'setup_schedulers', scheduled)
    monkeypatch.setattr(SRModel, 'init_training_settings', Good.init_training_settings)
    patches.average.patch_average()
    assert BaseModel.setup_schedulers is scheduled


def test_types_that_are_allowed_are_left_alone(monkeypatch):
    allowed = []
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: Counter())
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', allowed.extend, raising=False)
    patches.resume.patch_training_state_types()
    assert not allowed


def test_every_patch_has_such_a_test():
    rooms = [getattr(patches, name) for name in vars(patches)]
    rooms = [room for room in rooms if isinstance(room, types.ModuleType)]
    found = {value for room in rooms for name, value in vars(room).items() if name.startswith('patch_')}
    elsewhere = {
        patches.average.patch_average,
        patches.resume.patch_training_state_types,
        patches.resume.patch_load_resume_state,  # test_load_resume_state_of_a_script_is_replaced
        patches.samples.patch_build_dataloader,  # no BasicSR seeds samples, see tests/basicsr/test_samples.py
        patches.samples.patch_create_train_val_dataloader,
        patches.samples.patch_update_learning_rate,
        patches.validation.patch_validation,  # its end, in train_pipeline, cannot be told from here
        patches.options.patch_parse_options,  # no BasicSR checks options as it does
        patches.checkpoints.patch_build_model,  # no defect, but the end of what patch_parse_options begins
        patches.options.patch_copy_opt_file,  # BasicSR's has no other form, see tests/checkpoints/test_origin.py
        patches.options.patch_network_options,  # sections without a base, in tests/basicsr/test_adaptsr_runs.py
    }
    assert {apply for apply, _ in LEFT_ALONE} | elsewhere == found
