"""The mends of BasicSR 1.4.2, one function each.

Each `mend_…` names the defect that it mends, looks for that defect (never for a version, since BasicSR is also run from
a clone), and leaves BasicSR as it is where the defect is absent. `apply()` calls them all, and may be called again.
BasicSR imports names from module to module, and a clone's `train.py` runs as `__main__`: a function that is replaced is
therefore replaced in every module that holds it.
"""

import argparse
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import logging
import os
import re
import subprocess
import sys
import types
import weakref
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from lora_sr.adapters import is_lora_key
from lora_sr.checkpoint_file import load_weights, read_checkpoint, save_atomically, without_module_prefix
from lora_sr.errors import InputError
from lora_sr.option_file import OptionDumper, OptionLoader, apply_overrides, load_options


def apply() -> None:
    """Mend whatever is defective in the BasicSR that is installed; import it first if need be."""
    mend_torchvision_import()  # before all others: without it BasicSR cannot be imported
    mend_training_state_types()
    mend_get_optimizer()
    mend_lmdb_backend()
    mend_ordered_yaml()
    mend_distributed_start()
    mend_model_to_device()
    mend_check_resume()
    mend_load_resume_state()
    mend_load_network()
    mend_resume_training()
    mend_saving()
    mend_frozen_warnings()
    mend_missing_lora_warnings()
    mend_average()
    mend_average_of_frozen()
    mend_network_options()
    mend_degradation_device()
    mend_views()
    mend_perceptual_criterion()
    mend_parse_options()


# --- imports, optimizers ---


def mend_torchvision_import() -> None:
    """`basicsr.data.degradations` imports `torchvision.transforms.functional_tensor`, gone since torchvision 0.17.

    Only `rgb_to_grayscale` is wanted from there, and `torchvision.transforms.functional` has it.
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    from torchvision.transforms.functional import rgb_to_grayscale

    module = types.ModuleType(name, 'What BasicSR imports from a module that torchvision no longer has.')
    module.rgb_to_grayscale = rgb_to_grayscale
    sys.modules[name] = module


def __getattr__(name: str):
    """`OPTIMIZER_REGISTRY`, which `train.optim_*.type` is looked up in before `torch.optim`.

    It is a BasicSR registry and stands beside BasicSR's others; BasicSR can be imported only after its first mend.
    """
    if name != 'OPTIMIZER_REGISTRY':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    mend_torchvision_import()
    from basicsr.utils import registry

    if not hasattr(registry, name):
        registry.OPTIMIZER_REGISTRY = registry.Registry('optimizer')
    return registry.OPTIMIZER_REGISTRY


def find_optimizer(name: str) -> type:
    """The optimizer class of that name, from `OPTIMIZER_REGISTRY` or else from `torch.optim`.

    Raises:
        InputError: there is none; the nearest names are told.
    """
    known = {key: value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    known.update(iter(__getattr__('OPTIMIZER_REGISTRY')))
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f'did you mean {" or ".join(near)}?' if near else f'known are {", ".join(sorted(known))}'
        raise InputError(f"there is no optimizer '{name}'; {hint}")
    return known[name]


def _is_optimizer(value) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def mend_get_optimizer() -> None:
    """`BaseModel.get_optimizer` knows only Adam (a model that overrides it keeps its own)."""
    from basicsr.models.base_model import BaseModel

    if not _is_defective(BaseModel.get_optimizer, 'NotImplementedError'):
        return

    @_mend
    def get_optimizer(self, optim_type, params, lr, **kwargs):
        optimizer = find_optimizer(optim_type)
        known = inspect.signature(optimizer).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        unknown = [] if takes_any else [key for key in kwargs if key not in known]
        if unknown:
            raise InputError(
                f'{optim_type} takes no {", ".join(unknown)}; its options are {", ".join(list(known)[1:])}'
            )
        try:
            return optimizer(params, lr=lr, **kwargs)
        except (TypeError, ValueError) as error:
            raise InputError(f'{optim_type} cannot be set up with lr={lr}, {kwargs}: {error}') from error

    BaseModel.get_optimizer = get_optimizer


def mend_lmdb_backend() -> None:
    """`LmdbBackend` opens a database once for each data set, which lmdb refuses to do twice in a process.

    Two validation sets with the same GT, or training and validation without workers on the same database, fail so.
    """
    from basicsr.utils.file_client import LmdbBackend

    if not _is_defective(LmdbBackend.__init__, 'open'):
        return

    @_mend
    def __init__(self, db_paths, client_keys='default', readonly=True, lock=False, readahead=False, **kwargs):
        paths = db_paths if isinstance(db_paths, list) else [db_paths]
        keys = client_keys if isinstance(client_keys, list) else [client_keys]
        if len(paths) != len(keys):
            raise InputError(f'client_keys and db_paths of io_backend differ in number: {len(keys)} and {len(paths)}')
        self.db_paths = [str(path) for path in paths]
        settings = dict(readonly=readonly, lock=lock, readahead=readahead, **kwargs)
        self._client = {key: _open_database(path, settings) for key, path in zip(keys, self.db_paths)}

    LmdbBackend.__init__ = __init__


_databases = weakref.WeakValueDictionary()


def _open_database(path: str, settings: dict):
    import lmdb

    # A forked worker goes on with its parent's: read-only and without locks it is a mere memory map, and lmdb would
    # refuse to open it anew there.
    key = os.path.realpath(path)
    environment = _databases.get(key)
    if environment is None:
        environment = _databases[key] = lmdb.open(path, **settings)
    return environment


# --- option files and the command line ---


def mend_ordered_yaml() -> None:
    """`ordered_yaml` gives a loader that runs code (`!!python/object/apply:…`) and reads `1e-4` as a string."""
    from basicsr.utils import options

    if not issubclass(options.ordered_yaml()[0], yaml.constructor.FullConstructor):
        return

    @_mend
    def ordered_yaml():
        return OptionLoader, OptionDumper

    _replace_everywhere(options.ordered_yaml, ordered_yaml)


def mend_parse_options() -> None:
    """`parse_options` runs `--force_yml` through `exec` and `eval`, too late for the seed, and adds unknown keys.

    It also gives `dist_params` to `init_dist` under slurm alone. It is wrapped, never copied, since it differs between
    BasicSR's versions. As every pipeline calls it first, it also mends a `load_resume_state` that a script has defined
    after `import lora_sr`.
    """
    from basicsr.utils import options

    original = options.parse_options
    if not _is_defective(original, 'exec'):
        return
    namespace = original.__globals__

    @_mend
    @functools.wraps(original)
    def parse_options(root_path, is_train=True):
        mend_load_resume_state()
        path, entries, rest = _split_command_line(sys.argv[1:])
        if path is None:
            return original(root_path, is_train)  # argparse tells what is missing, or prints the help
        opt = load_options(path)
        apply_overrides(opt, entries)

        def init_dist(launcher, **_):
            start_distributed(launcher, opt)

        argv = [sys.argv[0], '-opt', path, *rest]
        loader = functools.partial(_PreparedOptions, opt)
        lists = _take_lists_of_roots(opt)
        with _swapped(namespace, ordered_yaml=lambda: (loader, OptionDumper), init_dist=init_dist):
            with _swapped(vars(sys), argv=argv):
                opt, args = original(root_path, is_train)
        for name, roots in lists.items():
            opt['datasets'][name]['dataroot_lq'] = [os.path.expanduser(root) for root in roots]
        args.force_yml = entries
        return opt, args

    _replace_everywhere(original, parse_options)


def _take_lists_of_roots(opt: dict) -> dict:
    """Take the lists under `dataroot_lq`, which `parse_options` takes for one path, out of the data sets' sections."""
    sections = {name: section for name, section in opt['datasets'].items() if isinstance(section, dict)}
    return {
        name: section.pop('dataroot_lq')
        for name, section in sections.items()
        if isinstance(section.get('dataroot_lq'), list)
    }


class _PreparedOptions:
    """Stands in for a YAML loader where the options have been read already."""

    def __init__(self, options: dict, stream):
        self.options = options

    def get_single_data(self) -> dict:
        return self.options

    def dispose(self) -> None:
        pass


def _split_command_line(argv: list):
    """The option file, the entries of `--force_yml` and all other arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('-opt')
    parser.add_argument('--force_yml', nargs='+', default=None)
    known, rest = parser.parse_known_args(argv)
    return known.opt, known.force_yml, rest


def mend_network_options() -> None:
    """Models read arguments of the generator from `network_g`, which `AdaptSR` has in a section `base` of its own.

    `SwinIRModel` looks for its `window_size` so.
    """
    from basicsr.models.base_model import BaseModel

    original = BaseModel.__init__
    if getattr(original, 'is_mend', False):
        return

    @_mend
    @functools.wraps(original)
    def __init__(self, opt):
        for key, section in opt.items():
            if key.startswith('network_') and isinstance(section, dict) and isinstance(section.get('base'), dict):
                opt[key] = _NestedOptions(section)
        original(self, opt)

    BaseModel.__init__ = __init__


class _NestedOptions(dict):
    """The section of a network around another: what it lacks is looked up in the section of that one, `base`."""

    def __missing__(self, key):
        return self['base'][key]

    def get(self, key, default=None):
        return dict.get(self, key, self['base'].get(key, default))


# --- distributed runs ---


def start_distributed(launcher: str, opt: dict) -> None:
    """Call BasicSR's `init_dist` with the option file's `dist_params`; the backend is NCCL unless they name another.

    Raises:
        InputError: NCCL where no GPU is there or wanted.
    """
    from basicsr.utils import dist_util

    params = dict(opt.get('dist_params') or {})
    backend = params.pop('backend', 'nccl')
    if backend == 'nccl' and (opt.get('num_gpu') == 0 or not torch.cuda.is_available()):
        raise InputError('dist_params.backend is nccl, which needs GPUs; for a run on CPUs write {backend: gloo}')
    if launcher == 'pytorch':
        params.pop('port', None)  # torchrun chooses the port; the key is slurm's, and many option files have it
    dist_util.init_dist(launcher, backend=backend, **params)


def mend_distributed_start() -> None:
    """`_init_dist_pytorch` and `_init_dist_slurm` compute `rank % device_count()`: a crash where there is no GPU."""
    from basicsr.utils import dist_util

    @_mend
    def init_pytorch(backend, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['RANK']) % torch.cuda.device_count())
        dist.init_process_group(backend=backend, **kwargs)

    @_mend
    def init_slurm(backend, port=None):
        rank = int(os.environ['SLURM_PROCID'])
        nodes = os.environ['SLURM_NODELIST']
        if port is not None:
            os.environ['MASTER_PORT'] = str(port)
        os.environ.setdefault('MASTER_PORT', '29500')
        hosts = subprocess.run(['scontrol', 'show', 'hostname', nodes], capture_output=True, text=True, check=True)
        os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
        os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
        os.environ['LOCAL_RANK'] = str(rank % max(1, torch.cuda.device_count()))
        os.environ['RANK'] = str(rank)
        init_pytorch(backend)

    if _is_defective(dist_util._init_dist_pytorch, 'device_count', without='is_available'):
        dist_util._init_dist_pytorch = init_pytorch
    if _is_defective(dist_util._init_dist_slurm, 'device_count', without='is_available'):
        dist_util._init_dist_slurm = init_slurm


def mend_model_to_device() -> None:
    """`BaseModel.model_to_device` gives DistributedDataParallel a CUDA device even where the network is on the CPU.

    It also lets it send buffers round at each forward pass, in which the other processes take no part where the first
    one validates: a network with buffers, such as LoRA's alphas or SwinIR's masks, then waits for them or fails. They
    are constants here; where they are statistics, each process keeps its own.
    """
    from basicsr.models.base_model import BaseModel

    original = BaseModel.model_to_device
    if not _is_defective(original, 'current_device', without='type'):
        return

    @_mend
    @functools.wraps(original)
    def model_to_device(self, net):
        if self.opt['dist'] and self.device.type == 'cpu':
            find_unused = self.opt.get('find_unused_parameters', False)
            net = torch.nn.parallel.DistributedDataParallel(net.to('cpu'), find_unused_parameters=find_unused)
        else:
            net = original(self, net)
        if isinstance(net, torch.nn.parallel.DistributedDataParallel):
            net.broadcast_buffers = False
        return net

    BaseModel.model_to_device = model_to_device


# --- resuming, reading, writing ---


def mend_training_state_types() -> None:
    """A training state holds a `collections.Counter`, which `torch.load(weights_only=True)` refuses in older torch."""
    probe = io.BytesIO()
    torch.save(Counter(), probe)
    probe.seek(0)
    try:
        torch.load(probe, weights_only=True)
    except Exception:  # the type of the refusal differs between versions of torch
        if hasattr(torch.serialization, 'add_safe_globals'):
            torch.serialization.add_safe_globals([Counter])
        else:  # before torch 2.4 the table of allowed types had no public door
            torch._weights_only_unpickler._get_allowed_globals()['collections.Counter'] = Counter


def mend_check_resume() -> None:
    """`check_resume` points every network to a file of the run, a frozen teacher as well, which is never saved.

    It also leaves a `param_key_*` that suits the pretrained file but not the run's own, whose weights are in `params`.
    """
    from basicsr.utils import misc

    original = misc.check_resume
    if not _is_defective(original, 'param_keys'):
        return

    @_mend
    @functools.wraps(original)
    def check_resume(opt, resume_iter):
        paths = opt['path']
        before = dict(paths)
        original(opt, resume_iter)
        for network in [key[len('network_') :] for key in opt if key.startswith('network_')]:
            key = f'pretrain_network_{network}'
            saved = paths.get(key)
            if saved is None or saved == before.get(key):
                continue
            if Path(saved).is_file():
                paths[f'param_key_{network}'] = 'params'
                continue
            was_saved = any(Path(saved).parent.glob(f'net_{network}_*.pth'))
            if network == 'g' or was_saved or before.get(key) is None:
                raise InputError(f'the run cannot be resumed at iteration {resume_iter}: {saved} is missing')
            for kept in (key, f'param_key_{network}'):
                if kept in before:
                    paths[kept] = before[kept]

    _replace_everywhere(original, check_resume)


def mend_load_resume_state() -> None:
    """`load_resume_state` puts the training state on a GPU that may not be there, and takes any file for a state.

    It is defined by the script that trains, hence looked for in every module.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        original = names.get('load_resume_state')
        if inspect.isfunction(original) and _is_defective(original, 'current_device'):
            names['load_resume_state'] = load_resume_state


def load_resume_state(opt: dict):
    """The training state to go on from, or None; `opt['path']` is set up for it.

    With `--auto_resume` it is the state of the run with the highest iteration, else `path.resume_state`.

    Raises:
        InputError: the state, or a network saved with it, is missing or damaged.
    """
    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        states = Path(opt['path']['training_states']).glob('*.state')
        iterations = [int(state.stem) for state in states if re.fullmatch('[0-9]+', state.stem)]
        path = os.path.join(opt['path']['training_states'], f'{max(iterations)}.state') if iterations else None
        if path is not None:
            opt['path']['resume_state'] = path
    if not path:
        return None
    state = read_checkpoint(path)
    missing = [key for key in ('epoch', 'iter', 'optimizers', 'schedulers') if key not in state]
    if missing:
        raise InputError(f'{path} is not a training state: it has no {", ".join(missing)}')
    from basicsr.utils import misc

    misc.check_resume(opt, state['iter'])
    return state


def mend_load_network() -> None:
    """`BaseModel.load_network` unpickles anything, and answers a wrong file with a traceback.

    Stock models also ask for the average under `params_ema` whatever the file: in one of plain weights it is the file.
    """
    from basicsr.models.base_model import BaseModel

    if not _is_defective(BaseModel.load_network, 'load', without='weights_only'):
        return

    @_mend
    def load_network(self, net, load_path, strict=True, param_key='params'):
        content = read_checkpoint(load_path)
        if net is getattr(self, 'net_g_ema', None) and not {'params', 'params_ema'} & content.keys():
            param_key = None
        load_weights(
            self.get_bare_model(net), content, load_path, param_key, strict, self._print_different_keys_loading
        )

    BaseModel.load_network = load_network


def mend_resume_training() -> None:
    """`BaseModel.resume_training` takes the state of any optimizer, and its step then fails on what is not its own."""
    from basicsr.models.base_model import BaseModel

    original = BaseModel.resume_training
    if getattr(original, 'is_mend', False):
        return

    def number_of_betas(state: dict) -> list:
        return [len(group.get('betas') or ()) for group in state['param_groups']]

    @_mend
    @functools.wraps(original)
    def resume_training(self, resume_state):
        for optimizer, state in zip(self.optimizers, resume_state['optimizers']):
            if number_of_betas(optimizer.state_dict()) != number_of_betas(state):
                options = ', '.join(key for key in state['param_groups'][0] if key != 'params')
                raise InputError(
                    f'the run cannot be resumed with {type(optimizer).__name__}: its optimizer had the options '
                    f'{options}; go on with that one, or begin anew'
                )
        original(self, resume_state)

    BaseModel.resume_training = resume_training


def mend_saving() -> None:
    """`save_network` and `save_training_state` write in place and only log a failure: a run may end with no result."""
    from basicsr.models.base_model import BaseModel
    from basicsr.utils.dist_util import master_only

    @_mend
    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        assert len(nets) == len(keys), 'The lengths of net and param_key should be the same.'
        content = {}
        for one, key in zip(nets, keys):
            content[key] = without_module_prefix(self.get_bare_model(one).state_dict())
        iteration = 'latest' if current_iter == -1 else current_iter
        save_atomically(content, os.path.join(self.opt['path']['models'], f'{net_label}_{iteration}.pth'))

    @_mend
    @master_only
    def save_training_state(self, epoch, current_iter):
        if current_iter == -1:
            return
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
        }
        save_atomically(state, os.path.join(self.opt['path']['training_states'], f'{current_iter}.state'))

    for mended in (save_network, save_training_state):
        if _is_defective(getattr(BaseModel, mended.__name__), 'save', without='replace'):
            setattr(BaseModel, mended.__name__, mended)


# --- networks with LoRA in stock models ---


def mend_frozen_warnings() -> None:
    """`SRModel.setup_optimizers` logs a warning for every frozen tensor: with LoRA, nearly all of them."""
    from basicsr.models.sr_model import SRModel

    original = SRModel.setup_optimizers
    if not _is_defective(original, 'named_parameters'):
        return

    @functools.wraps(original)
    def setup_optimizers(self):
        def is_kept(record):
            return not re.match('Params .* will not be optimized', record.getMessage())

        logger = logging.getLogger('basicsr')
        logger.addFilter(is_kept)
        try:
            original(self)
        finally:
            logger.removeFilter(is_kept)
        trains = [parameter.requires_grad for parameter in self.net_g.parameters()]
        if not all(trains):
            logger.warning(f'{len(trains) - sum(trains)} of {len(trains)} parameter tensors are frozen.')

    setup_optimizers.is_mend = True
    SRModel.setup_optimizers = setup_optimizers


def mend_missing_lora_warnings() -> None:
    """`_print_different_keys_loading` warns of every LoRA tensor that a base checkpoint, rightly, does not have."""
    from basicsr.models.base_model import BaseModel

    original = BaseModel._print_different_keys_loading
    if not _is_defective(original, 'warning'):
        return

    @functools.wraps(original)
    def _print_different_keys_loading(self, crt_net, load_net, strict=True):
        if strict and not any(map(is_lora_key, load_net)):
            own = self.get_bare_model(crt_net).state_dict()
            load_net = {**load_net, **{key: value for key, value in own.items() if is_lora_key(key)}}
        original(self, crt_net, load_net, strict)

    _print_different_keys_loading.is_mend = True
    BaseModel._print_different_keys_loading = _print_different_keys_loading


def mend_average() -> None:
    """`init_training_settings` builds the EMA network anew: what the file does not give is random, and another random.

    That is `lora_A`, and with `strict_load_g: false` every tensor that does not fit. There the average must start as a
    copy. `setup_schedulers` is the last step of every model's `init_training_settings`, whichever model overrides it.
    A resumed run has the average of its checkpoint already.
    """
    from basicsr.models.base_model import BaseModel
    from basicsr.models.sr_model import SRModel

    original = BaseModel.setup_schedulers
    if not _is_defective(SRModel.init_training_settings, 'build_network') or getattr(original, 'is_mend', False):
        return

    @functools.wraps(original)
    def setup_schedulers(self):
        original(self)
        average, path = getattr(self, 'net_g_ema', None), self.opt['path']
        if average is None or path.get('resume_state'):
            return
        own = self.get_bare_model(self.net_g).state_dict()
        given = {}
        if path.get('pretrain_network_g') is not None:
            content = read_checkpoint(path['pretrain_network_g'])
            given = without_module_prefix(content.get('params_ema', content.get('params', content)))
        copied = {key: value for key, value in own.items() if key not in given or given[key].shape != value.shape}
        average.load_state_dict({**average.state_dict(), **copied})

    setup_schedulers.is_mend = True
    BaseModel.setup_schedulers = setup_schedulers


def mend_average_of_frozen() -> None:
    """`model_ema` rounds in every step, also what is frozen: the average's base drifts away from the network's."""
    from basicsr.models.base_model import BaseModel

    if not _is_defective(BaseModel.model_ema, 'mul_', without='requires_grad'):
        return

    @_mend
    def model_ema(self, decay=0.999):
        own = dict(self.get_bare_model(self.net_g).named_parameters())
        for name, average in self.net_g_ema.named_parameters():
            if own[name].requires_grad:
                average.data.mul_(decay).add_(own[name].data, alpha=1 - decay)
            else:
                average.data.copy_(own[name].data)

    BaseModel.model_ema = model_ema


# --- degrading on the fly, perceptual loss ---


def mend_degradation_device() -> None:
    """`RealESRNetModel` and `RealESRGANModel` put what degrades images, and their pool of pairs, on a GPU: `.cuda()`.

    Without one that is a crash, and with `num_gpu: 0` another device than the images'.
    """
    from basicsr.models.realesrgan_model import RealESRGANModel
    from basicsr.models.realesrnet_model import RealESRNetModel
    from basicsr.utils import DiffJPEG, USMSharp

    for model in (RealESRNetModel, RealESRGANModel):
        if _is_defective(model.__init__, 'cuda'):
            model.__init__ = _set_up_degradations(model, DiffJPEG, USMSharp)
        if _is_defective(model._dequeue_and_enqueue, 'cuda'):
            model._dequeue_and_enqueue = _pool_on_device(model._dequeue_and_enqueue)


def _set_up_degradations(model: type, jpeg: type, sharpener: type):
    @_mend
    def __init__(self, opt):
        super(model, self).__init__(opt)
        self.jpeger = jpeg(differentiable=False).to(self.device)
        self.usm_sharpener = sharpener().to(self.device)
        self.queue_size = opt.get('queue_size', 180)

    return __init__


def _pool_on_device(original):
    @_mend
    @functools.wraps(original)
    def _dequeue_and_enqueue(self):
        # The original makes the pool, and complains of a size that is no multiple of the batch, where there is none.
        if not hasattr(self, 'queue_lr') and self.queue_size % len(self.lq) == 0:
            self.queue_lr = self.lq.new_zeros(self.queue_size, *self.lq.shape[1:])
            self.queue_gt = self.gt.new_zeros(self.queue_size, *self.gt.shape[1:])
            self.queue_ptr = 0
        original(self)

    return _dequeue_and_enqueue


def mend_views() -> None:
    """Views are taken of images with their channels last, which a CPU gives and then refuses to view.

    `DiffJPEG` gives such images to `filter2D`, and SwinIR to `VGGStyleDiscriminator`.
    """
    from basicsr.archs.discriminator_arch import VGGStyleDiscriminator
    from basicsr.utils import img_process_util

    def of_contiguous(original):
        @_mend
        @functools.wraps(original)
        def mended(*args, **kwargs):
            return original(*(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

        return mended

    if _is_defective(img_process_util.filter2D, 'view', without='contiguous'):
        _replace_everywhere(img_process_util.filter2D, of_contiguous(img_process_util.filter2D))
    if _is_defective(VGGStyleDiscriminator.forward, 'view', without='contiguous'):
        VGGStyleDiscriminator.forward = of_contiguous(VGGStyleDiscriminator.forward)


def mend_perceptual_criterion() -> None:
    """`PerceptualLoss` with `criterion: l2` asks torch for an `L2loss`, which it never had."""
    from basicsr.losses.basic_loss import PerceptualLoss

    original = PerceptualLoss.__init__
    if not _is_defective(original, 'L2loss'):
        return

    @_mend
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        given = inspect.signature(original).bind(self, *args, **kwargs)
        squared = given.arguments.get('criterion') == 'l2'
        if squared:
            given.arguments['criterion'] = 'l1'
        original(*given.args, **given.kwargs)
        if squared:
            self.criterion_type, self.criterion = 'l2', torch.nn.MSELoss()

    PerceptualLoss.__init__ = __init__


# --- tools of this file ---


def _mend(function):
    """Mark a function as one of ours, which is not to be mended again."""
    function.is_mend = True
    return function


def _is_defective(function, name: str, without: str = '') -> bool:
    """Whether the code of `function` uses `name`, but not `without`, as a later BasicSR might."""
    if getattr(function, 'is_mend', False):
        return False
    code = inspect.unwrap(function).__code__
    # Names of keyword arguments stand among the constants, in a tuple.
    keywords = [name for constant in code.co_consts if isinstance(constant, tuple) for name in constant]
    names = [*code.co_names, *code.co_varnames, *keywords]
    return name in names and without not in names


def _replace_everywhere(original, replacement) -> None:
    """Put `replacement` wherever a loaded module holds `original`, under whatever name."""
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        for name in [name for name, value in list(names.items()) if value is original]:
            names[name] = replacement


@contextlib.contextmanager
def _swapped(namespace: dict, **values):
    """Hold other values in a namespace for a while."""
    before = {name: namespace[name] for name in values}
    namespace.update(values)
    try:
        yield
    finally:
        namespace.update(before)
