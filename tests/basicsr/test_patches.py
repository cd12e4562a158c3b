"""The patches of BasicSR's start, options and files: the defect, and its repair."""

import contextlib
import inspect
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.archs import basicvsr_arch, dfdnet_arch, spynet_arch, tof_arch
from basicsr.models import base_model
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import MultiStepRestartLR
from basicsr.utils import dist_util, misc, options
from stock_basicsr import model, stock
from tiny_run import REPOSITORY

import lora_sr
from lora_sr import files, hook
from lora_sr.basicsr import patches
from lora_sr.basicsr.patches.optimizers import optimizer_registry
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import InputError
from lora_sr.files import save_atomically
from lora_sr.option_file import OptionLoader, apply_overrides, load_options


def run_python(*arguments, cwd, path=REPOSITORY):
    """Run Python in a process of its own, with the package importable, on one thread."""
    environment = dict(os.environ, PYTHONPATH=str(path), OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    for name in ('RANK', 'WORLD_SIZE'):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def stock_methods(monkeypatch):
    """BaseModel with BasicSR's own methods in place of the patched ones, for the length of a test."""
    original = stock(base_model, 'BaseModel')
    for name in ('get_optimizer', 'load_network', 'save_network', 'save_training_state', 'model_to_device'):
        monkeypatch.setattr(BaseModel, name, vars(original)[name])


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


def test_optimizers_of_packages(tmp_path, monkeypatch):
    """A class may come when it is asked for, have errors of its own, and end the process when it is imported."""
    (tmp_path / 'steps.py').write_text("""
import torch
class Wrong(Exception):
    pass
class Halved(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0, **kwargs):
        if lr > 1:
            raise Wrong(f'the rate {lr} is beyond 1')
        super().__init__(params, lr, momentum)
def __getattr__(name):
    if name == 'Late':
        return Halved
    raise AttributeError(name)
""")
    (tmp_path / 'quits.py').write_text('import sys\nsys.exit(3)\n')
    monkeypatch.syspath_prepend(tmp_path)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    for name in ('Halved', 'Late'):
        optimizer = model().get_optimizer(f'steps.{name}', parameters, lr=1e-3, momentum=0.9)
        assert type(optimizer).__name__ == 'Halved' and optimizer.defaults['momentum'] == 0.9
    assert type(model().get_optimizer('torch.optim.adam.Adam', parameters, lr=1e-3)) is torch.optim.Adam
    for name, sentence in (
        ('steps.Halfed', "no optimizer 'Halfed' in steps; did you mean Halved"),
        ('steps.Wrong', "no optimizer 'Wrong' in steps; known are Halved"),
        ('os.path', "no optimizer 'path' in os$"),
        (
            'stops.Halved',
            "package of 'stops.Halved' cannot be imported: .* 'stops'; it has to be installed",
        ),
        ('quits.Halved', "package of 'quits.Halved' cannot be imported: 3"),
        ('.Adam', "package of '.Adam' cannot be imported|no optimizer '.Adam'"),
    ):
        with pytest.raises(InputError, match=sentence):
            model().get_optimizer(name, parameters, lr=1e-3)
    with pytest.raises(InputError, match='steps.Halved cannot be set up with lr=2, {}: the rate 2 is beyond 1'):
        model().get_optimizer('steps.Halved', parameters, lr=2)


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
    apply_overrides(opt, ['train={lr: 2, x: 1}', 'train:x=3'])  # the second is of the first's section
    assert opt == {'train': {'lr': 2, 'x': 3}, 'name': 'a=b'}


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


@pytest.fixture
def no_spawn(monkeypatch):
    """BasicSR makes "spawn" the start method of the whole process, which the data loaders of later tests would keep."""
    monkeypatch.setattr(dist_util.mp, 'set_start_method', lambda method: None)


def test_stock_start_needs_a_gpu(no_spawn, monkeypatch):
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


def test_slurm_start(no_spawn, monkeypatch, tmp_path):
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho node7\necho node8\n')
    (tmp_path / 'scontrol').chmod(0o755)
    given = {'SLURM_PROCID': '3', 'SLURM_NTASKS': '4', 'SLURM_NODELIST': 'node[7-8]', 'SLURM_LOCALID': '1',
             'PATH': f'{tmp_path}:{os.environ["PATH"]}'}  # fmt: skip
    for name in ('MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'LOCAL_RANK', 'RANK'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    started = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: started.append(backend))
    patches.distributed.start_distributed('slurm', {'num_gpu': 0, 'dist_params': {'backend': 'gloo', 'port': 29511}})
    found = {name: os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'LOCAL_RANK', 'RANK')}
    assert started == ['gloo']
    assert found == {'MASTER_ADDR': 'node7', 'MASTER_PORT': '29511', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1', 'RANK': '3'}


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
    torch.save({'params': 3, 'optimizer': {}}, path)
    with pytest.raises(InputError, match='holds no state dict, i.e. no mapping of names to tensors'):
        model().load_network(net, str(path))
    torch.save({'params': torch.nn.Linear(3, 2).state_dict()}, path)
    with pytest.raises(InputError, match=r'does not fit Linear: weight has shape \(2, 3\) instead of \(2, 2\)'):
        model().load_network(net, str(path))
    torch.save({'params': {'bias': net.bias.data, 'w': net.bias.data}}, path)
    with pytest.raises(InputError, match=r'1 key is missing \(weight\), 1 key is not known to it'):
        model().load_network(net, str(path))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ('module', 'name', 'arguments'),
    [
        (spynet_arch, 'SpyNet', {'load_path': 'evil.pth'}),
        (tof_arch, 'SPyNetTOF', {'load_path': 'evil.pth'}),
        (basicvsr_arch, 'EDVRFeatureExtractor', {'num_input_frame': 5, 'num_feat': 4, 'load_path': 'evil.pth'}),
        (dfdnet_arch, 'DFDNet', {'num_feat': 4, 'dict_path': 'evil.pth'}),
    ],
)
def test_parts_of_networks_are_read_safely(tmp_path, monkeypatch, module, name, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # as before torch 2.6
    torch.save({'params': Evil(tmp_path / 'made')}, 'evil.pth')
    network = getattr(module, name)
    with contextlib.suppress(Exception):  # after the harm is done
        inspect.unwrap(network.__init__)(network.__new__(network), **arguments)
    assert (tmp_path / 'made').exists()
    (tmp_path / 'made').rmdir()
    with pytest.raises(InputError, match='evil.pth'):
        network(**arguments)
    assert not (tmp_path / 'made').exists() and torch.load.__module__ == 'torch.serialization'


def test_spynet_reads_its_weights(tmp_path):
    torch.manual_seed(0)
    state = {key: value for key, value in spynet_arch.SpyNet().state_dict().items() if key not in ('mean', 'std')}
    torch.save({'params': state}, tmp_path / 'spynet.pth')
    network = spynet_arch.SpyNet(str(tmp_path / 'spynet.pth'))
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


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
