"""The plug into BasicSR: in whatever order, process and state of BasicSR it is imported, a run of DSCLoRA works."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Callable

import pytest
import torch
import yaml
from basicsr.utils import registry
from tiny_run import TINY_OPTIONS, python_environment, run_python

from lora_sr import hook
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN
from lora_sr.basicsr.registration import register_all

pytestmark = pytest.mark.slow

SHIM = """\
import sys
import torchvision.transforms.functional as functional
sys.modules.setdefault('torchvision.transforms.functional_tensor', functional)
"""
RUN = "train_pipeline('.')\n"


@pytest.fixture
def run_folder(pairs: Path, tmp_path: Path) -> Path:
    """A folder with ``run.yml``, four iterations of DSCLoRA on a tiny SPAN, and the base checkpoint."""
    torch.manual_seed(0)
    torch.save({'params': SPAN(feature_channels=4, upscale=2).state_dict()}, tmp_path / 'base.pth')
    options = yaml.safe_load(TINY_OPTIONS.format(root=pairs, suffix='', backend='disk').replace('1e-3', '0.001'))
    del options['datasets']['val'], options['val']
    options.update(
        network_g={'type': 'DSCLoRA', 'feature_channels': 4, 'upscale': 2, 'rank': 2},
        path={'pretrain_network_g': 'base.pth'},
    )
    options['train']['total_iter'] = 4
    options['logger']['save_checkpoint_freq'] = 4
    write_options(tmp_path, options)
    return tmp_path


def read_options(folder: Path) -> dict:
    return yaml.safe_load((folder / 'run.yml').read_text())


def write_options(folder: Path, options: dict) -> None:
    (folder / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))


def run_script(folder: Path, text: str) -> subprocess.CompletedProcess:
    (folder / 'script.py').write_text(text)
    return run_python('script.py', '-opt', 'run.yml', cwd=folder)


def assert_trained(folder: Path, done: subprocess.CompletedProcess) -> None:
    """Four iterations have been logged, and have trained LoRA alone: the base in the checkpoint is as it was."""
    assert [int(number) for number in re.findall(r'iter: +(\d+), lr', done.stderr)] == [1, 2, 3, 4]
    base = torch.load(folder / 'base.pth', weights_only=True)['params']
    trained = torch.load(folder / 'experiments/tiny/models/net_g_4.pth', weights_only=True)['params']
    updates = [value for key, value in trained.items() if key.endswith('lora_B')]
    assert updates and all(value.any() for value in updates)
    kept = trained.keys() & base.keys()
    assert kept and all(torch.equal(trained[key], base[key]) for key in kept)


# --- order ---


@pytest.mark.slow
def test_lora_sr_first(run_folder: Path) -> None:
    assert_trained(
        run_folder, run_script(run_folder, 'import lora_sr\nfrom basicsr.train import train_pipeline\n' + RUN)
    )


@pytest.mark.slow
def test_basicsr_first(run_folder: Path) -> None:
    """What a script took from BasicSR before the plug is replaced in the script, too."""
    text = f'{SHIM}from basicsr.train import train_pipeline\nimport lora_sr\n'
    text += 'from basicsr.utils.options import parse_options\nassert parse_options.is_patch\n'
    assert_trained(run_folder, run_script(run_folder, text + RUN))


@pytest.mark.slow
@pytest.mark.parametrize('module', ['models', 'datasets', 'metrics', 'options', 'patches.options', 'registration'])
def test_any_module_of_the_plug_may_come_first(module: str, tmp_path: Path) -> None:
    """The plug must not find the module that imports BasicSR half-loaded."""
    code = f'import lora_sr.basicsr.{module}\nfrom basicsr.utils import registry\n'
    run_python('-c', code + "assert 'DistillationModel' in registry.MODEL_REGISTRY", cwd=tmp_path)


@pytest.mark.slow
def test_looking_for_basicsr_does_not_use_up_the_hook(tmp_path: Path) -> None:
    code = "import importlib.util, lora_sr\nassert importlib.util.find_spec('basicsr').loader.is_package('basicsr')\n"
    code += "from basicsr.utils.registry import ARCH_REGISTRY\nassert 'DSCLoRA' in ARCH_REGISTRY\n"
    run_python('-c', code, cwd=tmp_path)


@pytest.mark.slow
def test_basicsr_looks_as_it_does_without_us(tmp_path: Path) -> None:
    """To tools that look at specs and loaders, and after a reload."""
    run_python('-W', 'error::ImportWarning', '-c', LOOKS, cwd=tmp_path)


LOOKS = """
import importlib, importlib.machinery, inspect, sys
import lora_sr, basicsr
from basicsr.utils import options, registry
parse_options = options.parse_options
for _ in range(2):
    assert type(basicsr.__spec__) is importlib.machinery.ModuleSpec
    assert type(basicsr.__spec__.loader) is type(basicsr.__loader__) is importlib.machinery.SourceFileLoader
    assert 'from .archs import *' in inspect.getsource(basicsr)
    assert options.parse_options is parse_options and parse_options.is_patch
    names = [sorted(one.keys()) for one in (registry.ARCH_REGISTRY, registry.LOSS_REGISTRY, registry.MODEL_REGISTRY)]
    assert not any(name.endswith('_lora_sr') for one in names for name in one)
    importlib.reload(basicsr)
    importlib.reload(lora_sr)
    importlib.reload(sys.modules['lora_sr.hook']).install()
assert sum(type(finder).__module__ == 'lora_sr.hook' for finder in sys.meta_path) == 1
"""


# --- clones ---


@pytest.fixture
def clone(run_folder: Path) -> Callable[[], Path]:
    """Makes a clone of BasicSR's master beside the run: the installed package with what master has changed in it."""

    def make() -> Path:
        package = run_folder / 'basicsr'
        installed = importlib.util.find_spec('basicsr').submodule_search_locations[0]
        shutil.copytree(installed, package, ignore=shutil.ignore_patterns('__pycache__'))
        replace_in(package / 'data/degradations.py', 'transforms.functional_tensor', 'transforms.functional')
        replace_in(package / 'losses/basic_loss.py', 'torch.nn.L2loss()', 'torch.nn.MSELoss()')
        return package

    return make


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding='utf-8')
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding='utf-8')


def run_in_clone(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python with the clone on the path, as ``python setup.py develop`` puts it there."""
    environment = python_environment()
    environment['PYTHONPATH'] += os.pathsep + str(folder)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize('start', [['basicsr/train.py'], ['-m', 'basicsr.train']])
def test_training_script_of_a_clone(start: list[str], clone: Callable[[], Path], run_folder: Path) -> None:
    """With ``-m``, BasicSR itself imports its ``train.py``, and so ``lora_sr``, before it has loaded."""
    script = clone() / 'train.py'
    script.write_text('import lora_sr\n' + script.read_text(encoding='utf-8'), encoding='utf-8')
    assert_trained(run_folder, run_in_clone(run_folder, *start, '-opt', 'run.yml'))


@pytest.mark.slow
@pytest.mark.parametrize('is_empty', [False, True])
def test_a_network_in_a_clone_imports_us_while_basicsr_loads(
    is_empty: bool, clone: Callable[[], Path], run_folder: Path
) -> None:
    """The plug waits until BasicSR has loaded; many clones have an empty ``__init__.py``, and load by and by.

    The stock ``degradations.py`` cannot be imported here without the patch, which does not wait.
    """
    package = clone()
    replace_in(package / 'data/degradations.py', 'transforms.functional', 'transforms.functional_tensor')
    if is_empty:
        (package / '__init__.py').write_text('')
    (package / 'archs/my_arch.py').write_text(
        'import lora_sr\nfrom lora_sr.adapters import LoRAConfig\nfrom basicsr.utils.registry import ARCH_REGISTRY\n'
        "assert 'DSCLoRA' not in ARCH_REGISTRY\n"
    )
    first = 'import basicsr.archs' if is_empty else 'import basicsr'
    text = f'{first}\nfrom basicsr.utils.registry import ARCH_REGISTRY\nassert "DSCLoRA" in ARCH_REGISTRY\n'
    assert_trained(run_folder, run_in_clone(run_folder, *script(run_folder, text)))


def script(folder: Path, text: str) -> list[str]:
    (folder / 'script.py').write_text(f'{text}from basicsr.train import train_pipeline\n{RUN}')
    return ['script.py', '-opt', 'run.yml']


@pytest.mark.slow
def test_a_clone_without_a_module_is_without_its_defects(clone: Callable[[], Path], run_folder: Path) -> None:
    package = clone()
    (package / 'models/realesrgan_model.py').unlink()
    assert_trained(run_folder, run_in_clone(run_folder, *script(run_folder, 'import lora_sr\n')))


@pytest.mark.slow
def test_a_class_of_the_clone_keeps_its_name(clone: Callable[[], Path], run_folder: Path) -> None:
    """As NAFNet has a PSNRLoss, and the authors of LKDN have an LKDN. One warning says what ours are called."""
    package = clone()
    (package / 'archs/lkdn_arch.py').write_text(
        'from torch import nn\nfrom basicsr.utils.registry import ARCH_REGISTRY\n'
        '@ARCH_REGISTRY.register()\nclass LKDN(nn.Module):\n    pass\n'
    )
    file = package / 'losses/basic_loss.py'
    file.write_text(
        file.read_text(encoding='utf-8') + '\n\n@LOSS_REGISTRY.register()\nclass PSNRLoss(L1Loss):\n    pass\n',
        encoding='utf-8',
    )
    options = read_options(run_folder)
    options['train']['pixel_opt'] = {'type': 'PSNRLoss_lora_sr', 'loss_weight': 1.0}
    write_options(run_folder, options)
    done = run_in_clone(run_folder, *script(run_folder, NAMES))
    assert_trained(run_folder, done)
    assert done.stderr.count('BasicSR has its own') == 1
    warning = (
        'BasicSR has its own LKDN, PSNRLoss. The ones of lora_sr are registered as LKDN_lora_sr, PSNRLoss_lora_sr.'
    )
    assert done.stderr.splitlines()[0] == warning  # before BasicSR has set its logger up


NAMES = """
import lora_sr
from basicsr.archs.lkdn_arch import LKDN
from basicsr.losses import basic_loss
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY
from lora_sr import archs, losses
from lora_sr.basicsr.registration import register_all
for _ in range(2):
    assert ARCH_REGISTRY.get('LKDN') is LKDN and ARCH_REGISTRY.get('LKDN_lora_sr') is archs.LKDN
    assert LOSS_REGISTRY.get('PSNRLoss') is basic_loss.PSNRLoss
    assert LOSS_REGISTRY.get('PSNRLoss_lora_sr') is losses.PSNRLoss
    register_all()
"""


def test_the_warning_comes_from_one_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(registry.LOSS_REGISTRY, '_obj_map', {'PSNRLoss': object()})
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    monkeypatch.setenv('LOCAL_RANK', '1')
    register_all()
    assert 'PSNRLoss_lora_sr' in registry.LOSS_REGISTRY and not caplog.messages


# --- what is not BasicSR, or fails ---


def test_a_folder_called_basicsr_is_left_alone(tmp_path: Path) -> None:
    """Without BasicSR such a folder is a namespace package; before and after ``import lora_sr``."""
    (tmp_path / 'basicsr').mkdir()
    done = run_python('-S', '-c', FOLDER, cwd=tmp_path)
    assert done.stdout == 'lora-sr train needs BasicSR, which is not installed: pip install basicsr.\n' * 2


FOLDER = """
import sys
for before in (False, True):
    import basicsr
    assert basicsr.__spec__.origin is None
    if not before:
        del sys.modules['basicsr']
    import lora_sr.errors
    import basicsr
    try:
        lora_sr.errors.import_basicsr('lora-sr train')
    except ValueError as error:
        print(error)
    for name in [name for name in sys.modules if name.startswith('lora_sr')]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != 'lora_sr.hook']
"""


def test_import_that_is_forbidden(tmp_path: Path) -> None:
    run_python('-c', "import sys; sys.modules['basicsr'] = None; import lora_sr", cwd=tmp_path)


@pytest.mark.slow
def test_basicsr_that_fails_half_way(run_folder: Path, clone: Callable[[], Path]) -> None:
    """The next try is plugged into as well, and what the first has left behind does not harm it."""
    file = clone() / 'metrics/__init__.py'
    fails = (
        'import builtins\nif not hasattr(builtins, "tried"):\n    builtins.tried = True\n    raise OSError("busy")\n'
    )
    file.write_text(fails + file.read_text(encoding='utf-8'), encoding='utf-8')
    first = "try:\n    import basicsr\nexcept OSError as error:\n    assert str(error) == 'busy'\n"
    text = f"import lora_sr, sys\n{first}assert 'basicsr' not in sys.modules\n"
    assert_trained(run_folder, run_in_clone(run_folder, *script(run_folder, text)))


def test_basicsr_without_registries_is_left_alone(tmp_path: Path) -> None:
    """Clones of its first versions have none; so have other packages of that name."""
    (tmp_path / 'basicsr').mkdir()
    (tmp_path / 'basicsr/__init__.py').write_text('')
    done = run_in_clone(tmp_path, '-c', 'import sys; sys.path.insert(0, "."); import lora_sr, basicsr')
    place = re.escape(os.path.join('basicsr', '__init__.py'))
    assert re.fullmatch(
        rf'lora_sr plugs into BasicSR 1.4 and later; the one in \S*{place} has no registries and is left as it is.\n',
        done.stderr,
    )


@pytest.mark.parametrize('command', ['train', 'test'])
def test_pipelines_without_basicsr(command: str, tmp_path: Path) -> None:
    code = f'from lora_sr.cli.main import run_pipeline\nsys.exit(run_pipeline({command == "train"}))'
    assert_basicsr_is_wanted(code, f'error: lora_sr.{command}', tmp_path)


@pytest.mark.parametrize('command', ['train', 'test', 'allocate'])
def test_commands_without_basicsr(command: str, tmp_path: Path) -> None:
    arguments = [command, '-opt', 'run.yml', *(['--budget', '5%', '-o', 'new.yml'] if command == 'allocate' else [])]
    code = f'from lora_sr.cli.main import main\nsys.exit(main({arguments}))'
    assert_basicsr_is_wanted(code, f'lora-sr: error: lora-sr {command}', tmp_path)


def assert_basicsr_is_wanted(code: str, beginning: str, folder: Path) -> None:
    """It is said in one sentence; on Python 3.13 that no version of BasicSR is for it."""
    for version, end in (('3, 12', 'pip install basicsr.\n'), ('3, 13', 'and this is 3.13; use Python 3.9 to 3.12.\n')):
        start = f"import sys\nsys.modules['basicsr'] = None\nsys.version_info = ({version}, 0)\n"
        told = run_python('-c', start + code, cwd=folder, status=2).stderr
        assert told.startswith(f'{beginning} needs BasicSR, which is not installed: ')
        assert told.endswith(end) and told.count('\n') == 1


# --- the finder and its loader by themselves ---


def test_loader_can_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = hook._Loader(importlib.util.find_spec('json').loader)
    copied = pickle.loads(pickle.dumps(loader))
    assert copied.get_filename('json') == json.__file__
    assert not hasattr(copied, 'no_such_thing')


@pytest.mark.slow
@pytest.mark.parametrize('first', ['import lora_sr', SHIM])
def test_threads(first: str, tmp_path: Path) -> None:
    """Threads import BasicSR at the same time, and the main one lora_sr: each gets a whole BasicSR.

    None imports a module of BasicSR first: with any package that imports its own modules, Python's locks then fail.
    """
    run_python('-c', first + THREADS, cwd=tmp_path)


THREADS = """
import sys, threading, time
errors = []

def work():
    try:
        import basicsr
        from basicsr.archs import build_network
    except BaseException as error:
        errors.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
while 'basicsr.archs' not in sys.modules:
    time.sleep(0.001)
assert sys.modules['basicsr'].__spec__._initializing
import lora_sr
for thread in threads:
    thread.join()
assert not errors, errors
from basicsr.utils import options, registry
assert options.parse_options.is_patch and 'DistillationModel' in registry.MODEL_REGISTRY
"""


def loading(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that the import system is loading."""
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    module.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_call_when_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = loading('basicsr.half', monkeypatch)
    assert hook._loading_spec() is module.__spec__
    hook._call_when_loaded(module.__spec__, lambda: calls.append('loaded'))
    assert module.__spec__._initializing and not calls
    module.__spec__._initializing = False
    assert calls == ['loaded'] and type(module.__spec__) is importlib.machinery.ModuleSpec

    module = loading('basicsr.failing', monkeypatch)
    hook._call_when_loaded(module.__spec__, lambda: calls.append('failed'))
    monkeypatch.delitem(sys.modules, 'basicsr.failing')
    module.__spec__._initializing = False
    assert calls == ['loaded']

    module = loading('basicsr.done', monkeypatch)
    module.__spec__._initializing = False  # another thread was faster
    hook._call_when_loaded(module.__spec__, lambda: calls.append('faster'))
    assert calls == ['loaded', 'faster']


# --- processes ---


@pytest.mark.slow
@pytest.mark.parametrize('dataset', ['PairedImageDataset', 'LRImageDataset'])
def test_spawned_workers(dataset: str, run_folder: Path, pairs: Path) -> None:
    """A spawned worker begins without BasicSR, and imports it to unpickle the dataset."""
    options = read_options(run_folder)
    section = options['datasets']['train']
    section.update(num_worker_per_gpu=2, type=dataset, dataset_enlarge_ratio=1)
    if dataset == 'LRImageDataset':
        # A student that starts as its teacher would have nothing to learn.
        torch.save({'params': SPAN(feature_channels=5, upscale=2).state_dict()}, run_folder / 'teacher.pth')
        del section['dataroot_gt'], section['gt_size']
        section['lq_size'] = 8
        options.update(model_type='DistillationModel', network_t={'type': 'SPAN', 'feature_channels': 5, 'upscale': 2})
        options['path']['pretrain_network_t'] = 'teacher.pth'
        options['train']['distill_pixel_opt'] = options['train'].pop('pixel_opt')
    write_options(run_folder, options)
    text = "import multiprocessing\nimport lora_sr\nif __name__ == '__main__':\n"
    text += "    multiprocessing.set_start_method('spawn')\n    from basicsr.train import train_pipeline\n"
    assert_trained(run_folder, run_script(run_folder, f'{text}    {RUN}'))


@pytest.mark.slow
def test_two_processes_under_torchrun(run_folder: Path) -> None:
    (run_folder / 'script.py').write_text(f'import lora_sr\nfrom basicsr.train import train_pipeline\n{RUN}')
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2]
    done = run_python(*launcher, 'script.py', '-opt', 'run.yml', '--launcher', 'pytorch', cwd=run_folder)
    assert 'DistributedDataParallel - DSCLoRA' in done.stderr
    assert_trained(run_folder, done)


@pytest.mark.slow
@pytest.mark.parametrize('command', [['-m', 'lora_sr.train'], ['-m', 'lora_sr.cli.main', 'train']])
def test_interrupt_while_basicsr_is_imported(command: list[str], tmp_path: Path) -> None:
    """One line and no traceback; also where a library makes an ImportError of Ctrl-C, as NumPy does."""
    (tmp_path / 'basicsr').mkdir()
    (tmp_path / 'basicsr/__init__.py').write_text(
        'import time\nprint("loading", flush=True)\ntry:\n    time.sleep(60)\n'
        'except KeyboardInterrupt:\n    raise ImportError("cannot load module more than once per process")\n'
    )
    environment = python_environment()
    environment['PYTHONPATH'] += os.pathsep + str(tmp_path)
    process = subprocess.Popen(
        [sys.executable, *command, '-opt', 'run.yml'],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'loading\n'
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.removeprefix('lora-sr: ')) == (130, 'interrupted\n')


# --- what is imported, and how fast ---

HEAVY = ['basicsr', 'torchvision', 'scipy']


def modules_after(code: str, folder: Path) -> set[str]:
    done = run_python('-c', f'{code}\nimport sys\nprint("MODULES", *sys.modules)', cwd=folder)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_import_is_light(tmp_path: Path) -> None:
    """``-W error`` holds it to no warning; the seconds are of the processor, over those of Python alone."""
    found = modules_after('import lora_sr', tmp_path)
    assert not found & {*HEAVY, 'torch', 'numpy', 'cv2', 'yaml', 'logging', 'inspect', 'argparse'}
    alone, ours = (seconds(code, tmp_path) for code in ('pass', 'import lora_sr'))
    assert ours - alone < 0.05


def seconds(code: str, folder: Path) -> float:
    """The least of five: of processor time, but a machine under load still adds to it."""
    code = f'import time\n{code}\nprint(time.process_time())'
    return min(float(run_python('-W', 'error', '-c', code, cwd=folder).stdout) for _ in range(5))


def test_adapters_need_no_basicsr(tmp_path: Path) -> None:
    assert not modules_after('import lora_sr.adapters', tmp_path) & {*HEAVY}


NETWORKS = """
import torch
import lora_sr
for name in ('span', 'lkdn'):
    network = lora_sr.optimize(lora_sr.load_network(f'{name}.pth'))
    with torch.no_grad():
        assert network(torch.rand(1, 3, 16, 16)).shape == (1, 3, 32, 32)
"""


@pytest.mark.slow
def test_networks_need_no_basicsr(tmp_path: Path) -> None:
    torch.save({'params': SPAN(feature_channels=4, upscale=2).state_dict()}, tmp_path / 'span.pth')
    torch.save({'params': LKDN(num_feat=4, num_block=1, upscale=2).state_dict()}, tmp_path / 'lkdn.pth')
    assert not modules_after(NETWORKS, tmp_path) & {*HEAVY}


def test_help_is_quick(tmp_path: Path) -> None:
    """The parsers of all sub-commands import nothing heavy."""
    code = "import sys\nfrom lora_sr.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(code, tmp_path) & {*HEAVY, 'torch', 'numpy', 'cv2'}
