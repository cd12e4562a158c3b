"""The check of an option file before a run starts: everything that is wrong, at once, one sentence each."""

import difflib
import inspect
import math
import os
import re
import tempfile
from pathlib import Path

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from lora_sr.archs import fold, read_state_dict
from lora_sr.basicsr_compat import find_optimizer
from lora_sr.checkpoint_file import load_weights, read_checkpoint
from lora_sr.dataset_check import check_pairs
from lora_sr.errors import InputError
from lora_sr.models.distillation_model import DATA_PARALLEL_REFUSED, MEMORY_FORMATS, affinity_layers, find_modules

SCHEDULERS = {
    'MultiStepLR': MultiStepRestartLR,
    'MultiStepRestartLR': MultiStepRestartLR,
    'CosineAnnealingRestartLR': CosineAnnealingRestartLR,
}
# Keys that BasicSR's own code reads. It ignores all others, and so does this check, unless one is almost one of these.
KNOWN = {
    '': 'name model_type scale num_gpu manual_seed datasets network_g network_d network_t path train val logger '
    'dist_params find_unused_parameters',
    'path': 'pretrain_network_g pretrain_network_d pretrain_network_t strict_load_g strict_load_d strict_load_t '
    'param_key_g param_key_d param_key_t resume_state ignore_resume_networks experiments_root results_root',
    'train': 'total_iter warmup_iter ema_decay optim_g optim_d scheduler pixel_opt perceptual_opt gan_opt',
    'val': 'val_freq save_img suffix metrics pbar',
    'logger': 'print_freq save_checkpoint_freq use_tb_logger wandb',
    'dataset': 'name type dataroot_gt dataroot_lq meta_info_file io_backend filename_tmpl gt_size use_hflip use_rot '
    'batch_size_per_gpu num_worker_per_gpu dataset_enlarge_ratio prefetch_mode num_prefetch_queue pin_memory '
    'persistent_workers mean std color',
}
# The section `train` of our own model takes these and no other.
DISTILLATION_TRAIN_KEYS = (
    'pixel_opt distill_pixel_opt affinity_opt memory_format ema_decay optim_g scheduler total_iter warmup_iter'
)


def check_options(opt: dict, is_train: bool, root_path=None, processes: int = 1) -> list:
    """What is wrong with the options of a run, as sentences; an empty list if nothing is.

    Args:
        opt: the options as the file and `--force_yml` give them; they are not changed.
        is_train: whether they are for training rather than for a test.
        root_path: the folder that will hold `experiments/` or `results/`; by default the current one.
        processes: how many processes the run has, on all its machines.
    """
    return _Check(opt, is_train, Path(root_path or os.getcwd()), processes).run()


class _Check:
    def __init__(self, opt: dict, is_train: bool, root: Path, processes: int):
        self.opt, self.is_train, self.root, self.processes = opt, is_train, root, processes
        self.problems = []
        self.networks = {}
        self.ours = opt.get('model_type') == 'DistillationModel'

    def run(self) -> list:
        required = 'name model_type num_gpu datasets network_g path' + (' train logger' if self.is_train else ' val')
        self.section('', self.opt, KNOWN[''], required)
        self.check_top()
        for key in [key for key in self.opt if key.startswith('network_')]:
            self.check_network(key)
        self.check_path()
        if self.is_train:
            self.check_train()
            self.check_logger()
        self.check_val()
        self.check_datasets()
        self.check_output()
        return self.problems

    # --- tools ---

    def add(self, sentence) -> None:
        self.problems.append(str(sentence))

    def section(self, where: str, given, known: str, required: str = '', only_known: bool = False) -> bool:
        """Check the keys of a section. Returns whether it is a section that has all it needs."""
        if not isinstance(given, dict):
            self.add(f'{where} has to be a section of keys, not {given!r}')
            return False
        prefix = f'{where}.' if where else ''
        complete = True
        absent = [key for key in known.split() if key not in given]
        for key in [key for key in given if key not in known.split()]:
            near = difflib.get_close_matches(str(key), absent, n=1, cutoff=0.6 if only_known else 0.85)
            if near:
                absent.remove(near[0])
                complete = complete and near[0] not in required.split()
                self.add(f"{prefix}{key} is not a known key; did you mean '{near[0]}'?")
            elif only_known:
                complete = False
                self.add(f'{prefix}{key} is not a known key; the keys here are {", ".join(known.split())}')
        for key in required.split():
            if key in absent or (key not in known.split() and key not in given):
                complete = False
                self.add(f'{prefix}{key} is missing')
        return complete

    def number(self, where: str, value, least=0, whole=True) -> bool:
        """Check that a value is a number, and at least `least`."""
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least
        if not good or (whole and value != int(value)):
            self.add(f'{where} has to be a {"whole " if whole else ""}number of at least {least}, not {value!r}')
            return False
        return True

    def registered(self, where: str, name, registry, what: str):
        """The class or function of that name in a registry or dictionary, or None."""
        known = registry if isinstance(registry, dict) else dict(iter(registry))  # its keys() lacks a [] to go with it
        if name is None:
            self.add(f'{where} is missing')
        elif f'{name}_basicsr' in known:  # how BasicSR registers what Real-ESRGAN registers too, and finds it
            return known[f'{name}_basicsr']
        elif name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f'did you mean {" or ".join(near)}?' if near else f'known are {", ".join(sorted(known))}'
            self.add(f"{where}: there is no {what} '{name}'; {hint}")
        return known.get(name)

    def arguments(self, where: str, function, given: dict, ours: tuple = (), supplied: tuple = ()) -> bool:
        """Check keys of a section against the parameters of what they are handed to.

        Args:
            ours: keys of the section that are not handed on.
            supplied: parameters that come from elsewhere.
        """
        parameters = inspect.signature(function).parameters
        named = [
            name
            for name, p in parameters.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in supplied
        ]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        needed = [name for name in named if parameters[name].default is inspect.Parameter.empty]
        given = {key: value for key, value in given.items() if key not in ('type', *ours)}
        return self.section(where, given, ' '.join(named), ' '.join(needed), only_known=not takes_any)

    def subsection(self, name: str) -> dict:
        """A section of the file, empty where it is missing or is none (which is told elsewhere)."""
        value = self.opt.get(name)
        return value if isinstance(value, dict) else {}

    # --- sections ---

    def check_top(self) -> None:
        opt = self.opt
        if 'name' in opt and (not isinstance(opt['name'], str) or not opt['name'] or os.sep in opt['name']):
            self.add(f'name has to be the name of a folder, not {opt["name"]!r}')
        if 'model_type' in opt:
            self.registered('model_type', opt['model_type'], MODEL_REGISTRY, 'model')
        if 'scale' in opt:
            self.number('scale', opt['scale'], 1)
        gpus = opt.get('num_gpu')
        if 'num_gpu' in opt and gpus != 'auto' and self.number('num_gpu', gpus):
            there = torch.cuda.device_count()
            if gpus > there and not (self.processes > 1 and there):
                self.add(f'num_gpu is {gpus}, but this machine has {there}; 0 is for the CPU, auto for what is there')
        if self.ours and self.is_train and 'network_t' not in opt:
            self.add('network_t, the teacher of a DistillationModel, is missing')

    def check_network(self, key: str) -> None:
        section = self.opt[key]
        if not isinstance(section, dict):
            self.add(f'{key} has to be a section of keys, not {section!r}')
            return
        arch = self.registered(f'{key}.type', section.get('type'), ARCH_REGISTRY, 'network')
        if arch is None or not self.arguments(key, arch, section):
            return
        scale = self.opt.get('scale')
        for name in ('upscale', 'scale', 'upscale_factor'):
            parameter = inspect.signature(arch).parameters.get(name)
            if parameter is None or scale is None or key not in ('network_g', 'network_t'):
                continue
            value = section.get(name, parameter.default)
            if isinstance(value, int) and value != scale:
                default = '' if name in section else f' by default in {section["type"]}'
                self.add(f'{key}.{name} is {value}{default}, but scale is {scale}; they have to be equal')
                return
        if key in ('network_g', 'network_t') and (self.is_train or key == 'network_g'):
            try:
                self.networks[key] = arch(**{name: value for name, value in section.items() if name != 'type'})
            except InputError as error:
                self.add(f'{key}: {error}')
            except (
                AssertionError,
                ArithmeticError,
                LookupError,
                OSError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                reason = f': {error}' if str(error) else ''
                self.add(f'{key}: {section["type"]} cannot be built from these values{reason}')

    def check_path(self) -> None:
        path = self.opt.get('path')
        networks = [key for key in path or () if re.match('(pretrain_network|strict_load|param_key)_.', str(key))]
        if 'path' not in self.opt or not self.section('path', path, f'{KNOWN["path"]} {" ".join(networks)}'):
            return
        resume = path.get('resume_state')
        files = [key for key in path if key.startswith('pretrain_network') and path[key] is not None]
        for key in files:
            if not self.ours or self.is_train or key != 'pretrain_network_t':
                network = key[len('pretrain_') :]
                if network not in self.opt:
                    self.add(f'path.{key} is given, but there is no {network}')
                else:
                    self.check_checkpoint(path, key, network)
        if self.is_train and resume is not None:
            try:
                read_checkpoint(os.path.expanduser(str(resume)))
            except InputError as error:
                self.add(f'path.resume_state: {error}')
        if self.ours and self.is_train and path.get('pretrain_network_t') is None:
            self.add('path.pretrain_network_t, the trained weights of the teacher, is missing')

    def check_checkpoint(self, path: dict, key: str, network: str) -> None:
        if network != 'network_t' and self.is_train and self.resumes():
            return  # its weights will come from the run that goes on
        file = os.path.expanduser(str(path[key]))
        letter = network[len('network_') :]
        net = self.networks.get(network)
        try:
            if network == 'network_t' and self.ours:
                state = read_state_dict(file, path.get('param_key_t'))
                if net is not None:
                    load_weights(net, state, file, strict=path.get('strict_load_t', True))
                    fold(net)
            elif net is not None:
                load_weights(
                    net,
                    read_checkpoint(file),
                    file,
                    path.get(f'param_key_{letter}', 'params'),
                    path.get(f'strict_load_{letter}', True),
                )
            else:
                read_checkpoint(file)
        except InputError as error:
            self.add(f'path.{key}: {error}')

    def resumes(self) -> bool:
        path = self.subsection('path')
        states = self.output_folder() / str(self.opt.get('name')) / 'training_states'
        return path.get('resume_state') is not None or (
            bool(self.opt.get('auto_resume')) and any(states.glob('*.state'))
        )

    def check_train(self) -> None:
        train = self.opt.get('train')
        if 'train' not in self.opt:
            return
        known = DISTILLATION_TRAIN_KEYS if self.ours else KNOWN['train']
        self.section('train', train, known, 'total_iter optim_g scheduler', only_known=self.ours)
        if not isinstance(train, dict):
            return
        total = train.get('total_iter')
        if 'total_iter' in train and not self.number('train.total_iter', total, 1):
            total = None
        if train.get('ema_decay') is not None and self.number('train.ema_decay', train['ema_decay'], 0, False):
            if train['ema_decay'] >= 1:
                self.add(f'train.ema_decay has to be less than 1, not {train["ema_decay"]}')
        for key, section in train.items():
            if key.startswith('optim_'):
                self.check_optimizer(f'train.{key}', section)
            elif key.endswith('_opt') and section is not None:
                self.check_loss(f'train.{key}', section)
        if 'scheduler' in train:
            self.check_scheduler(train['scheduler'], total)
        if self.ours:
            self.check_distillation(train)
        elif self.opt.get('model_type') == 'SRModel' and not (train.get('pixel_opt') or train.get('perceptual_opt')):
            self.add('train.pixel_opt and train.perceptual_opt are both missing; SRModel needs one of them')

    def check_optimizer(self, where: str, section) -> None:
        if not isinstance(section, dict):
            self.add(f'{where} has to be a section of keys, not {section!r}')
        elif section.get('type') is None:
            self.add(f'{where}.type is missing')
        else:
            try:
                optimizer = find_optimizer(section['type'])
            except InputError as error:
                self.add(f'{where}.type: {error}')
                return
            self.arguments(where, optimizer, section, supplied=('params',))
            if 'lr' not in section:
                if not any(problem.endswith("did you mean 'lr'?") for problem in self.problems):
                    self.add(f'{where}.lr is missing')
            elif self.number(f'{where}.lr', section['lr'], 0, whole=False):
                self.try_optimizer(where, optimizer, section)

    def try_optimizer(self, where: str, optimizer: type, section: dict) -> None:
        options = {key: value for key, value in section.items() if key != 'type'}
        if any(key not in inspect.signature(optimizer).parameters for key in options):
            return
        try:
            optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)
        except (TypeError, ValueError, RuntimeError) as error:
            self.add(f'{where}: {section["type"]} refuses these values: {str(error).splitlines()[0]}')

    def check_loss(self, where: str, section) -> None:
        if not isinstance(section, dict):
            self.add(f'{where} has to be a section of keys, not {section!r}')
            return
        loss = self.registered(f'{where}.type', section.get('type'), LOSS_REGISTRY, 'loss')
        if loss is not None:
            self.arguments(where, loss, section, ours=('layers',) if where == 'train.affinity_opt' else ())

    def check_scheduler(self, section, total) -> None:
        if not isinstance(section, dict):
            self.add(f'train.scheduler has to be a section of keys, not {section!r}')
            return
        scheduler = self.registered('train.scheduler.type', section.get('type'), SCHEDULERS, 'scheduler')
        if scheduler is None or not self.arguments(
            'train.scheduler', scheduler, section, supplied=('optimizer', 'last_epoch')
        ):
            return
        for key in ('milestones', 'periods', 'restarts', 'restart_weights'):
            value = section.get(key, [])
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, (int, float)) for item in value):
                self.add(f'train.scheduler.{key} has to be a list of numbers, not {value!r}')
                return
        pair = 'restarts' if scheduler is MultiStepRestartLR else 'periods'
        count, weights = len(section.get(pair, [0])), len(section.get('restart_weights', [1]))
        if count != weights:
            self.add(
                f'train.scheduler.restart_weights has {weights} values, but {pair} {count}; they have to be as many'
            )
        if scheduler is CosineAnnealingRestartLR and total is not None and sum(section['periods']) < total:
            self.add(
                f'train.scheduler.periods add up to {sum(section["periods"])}, '
                f'which has to be at least train.total_iter ({total})'
            )

    def check_distillation(self, train: dict) -> None:
        form = train.get('memory_format')
        if form is not None and form not in MEMORY_FORMATS:
            self.add(f"train.memory_format: there is no '{form}'; it is one of {', '.join(MEMORY_FORMATS)}")
        affinity = train.get('affinity_opt')
        if not train.get('distill_pixel_opt') and not affinity:
            near = [
                problem
                for problem in self.problems
                if "'distill_pixel_opt'?" in problem or "'affinity_opt'?" in problem
            ]
            if not near:
                self.add(
                    'train.distill_pixel_opt and train.affinity_opt are both missing; without one of them nothing '
                    'is learned from the teacher'
                )
        if not isinstance(affinity, dict):
            return
        if self.processes == 1 and self.gpus() > 1:
            self.add(DATA_PARALLEL_REFUSED)
        try:
            names = affinity_layers(affinity.get('layers'))
        except InputError as error:
            self.add(error)
            return
        for role, key in (('student', 'network_g'), ('teacher', 'network_t')):
            if key in self.networks:
                try:
                    # The teacher has been folded, as it will be in the run: other names may be gone, or new.
                    find_modules(self.networks[key], names[role], role)
                except InputError as error:
                    self.add(error)

    def gpus(self) -> int:
        """How many GPUs this process is to use."""
        gpus = self.opt.get('num_gpu')
        return torch.cuda.device_count() if gpus == 'auto' else gpus if isinstance(gpus, int) else 0

    def check_logger(self) -> None:
        logger = self.opt.get('logger')
        if 'logger' not in self.opt:
            return
        self.section('logger', logger, KNOWN['logger'], 'print_freq save_checkpoint_freq use_tb_logger')
        for key in ('print_freq', 'save_checkpoint_freq'):
            if isinstance(logger, dict) and key in logger:
                self.number(f'logger.{key}', logger[key], 1)

    def check_val(self) -> None:
        val = self.opt.get('val')
        if val is None:
            return
        required = 'val_freq save_img' if self.is_train else 'save_img'
        if isinstance(val, dict) and not self.is_train and val.get('save_img'):
            required += ' suffix'
        self.section('val', val, KNOWN['val'], required)
        if not isinstance(val, dict):
            return
        if self.is_train and 'val_freq' in val:
            self.number('val.val_freq', val['val_freq'], 1)
        metrics = val.get('metrics')
        if metrics is not None and not isinstance(metrics, dict):
            self.add(f'val.metrics has to be a section of keys, not {metrics!r}')
            return
        for name, section in (metrics or {}).items():
            where = f'val.metrics.{name}'
            if not isinstance(section, dict):
                self.add(f'{where} has to be a section of keys, not {section!r}')
                continue
            metric = self.registered(f'{where}.type', section.get('type'), METRIC_REGISTRY, 'metric')
            if metric is not None:
                self.arguments(where, metric, section, ours=('better',), supplied=('img', 'img2'))

    # --- data sets ---

    def check_datasets(self) -> None:
        datasets = self.opt.get('datasets')
        if 'datasets' not in self.opt:
            return
        if not isinstance(datasets, dict) or not datasets:
            self.add(f'datasets has to be a section of data sets, not {datasets!r}')
            return
        if self.is_train and 'train' not in datasets:
            self.add(f'datasets.train is missing; the data sets are {", ".join(map(str, datasets))}')
        for name, dataset in datasets.items():
            phase = str(name).split('_')[0]
            if phase not in (('train', 'val') if self.is_train else ('val', 'test', 'train')):
                allowed = 'train or val, val_2, …' if self.is_train else 'test, test_2, …'
                self.add(f'datasets.{name}: a data set is named {allowed}')
            elif self.is_train or phase != 'train':
                self.check_dataset(f'datasets.{name}', dataset, phase == 'train')

    def check_dataset(self, where: str, dataset, training: bool) -> None:
        if not isinstance(dataset, dict):
            self.add(f'{where} has to be a section of keys, not {dataset!r}')
            return
        paired = dataset.get('type') == 'PairedImageDataset'
        required = 'name type'
        if training:
            required += ' batch_size_per_gpu num_worker_per_gpu'
        if paired:
            required += ' dataroot_gt dataroot_lq io_backend' + (' gt_size use_hflip use_rot' if training else '')
        complete = self.section(where, dataset, KNOWN['dataset'], required)
        if 'type' in dataset:
            self.registered(f'{where}.type', dataset['type'], DATASET_REGISTRY, 'data set')
        before = len(self.problems)
        self.check_loading(where, dataset, training)
        if not paired:
            for key in [key for key in dataset if key.startswith('dataroot') and isinstance(dataset[key], str)]:
                if not os.path.exists(os.path.expanduser(dataset[key])):
                    self.add(f'{where}.{key}: {dataset[key]} does not exist')
            return
        backend = dataset.get('io_backend')
        if 'io_backend' in dataset and (not isinstance(backend, dict) or backend.get('type') not in ('disk', 'lmdb')):
            if not isinstance(backend, dict) or backend.get('type') != 'memcached':
                self.add(f'{where}.io_backend has to be {{type: disk}} or {{type: lmdb}}, not {_plain(backend)}')
            return
        scale = self.opt.get('scale')
        if scale is None:
            if not any("'scale'?" in problem or problem == 'scale is missing' for problem in self.problems):
                self.add('scale is missing')
            return
        if not complete or len(self.problems) > before or not isinstance(scale, int) or scale < 1:
            return
        if training and dataset['gt_size'] % scale:
            self.add(f'{where}.gt_size is {dataset["gt_size"]}, which has to be a multiple of scale ({scale})')
            return
        problems, count = check_pairs(where, dataset, scale, training)
        self.problems += problems
        if training and count is not None:
            self.check_amount(where, dataset, count)

    def check_loading(self, where: str, dataset: dict, training: bool) -> None:
        for key, least in (('batch_size_per_gpu', 1), ('num_worker_per_gpu', 0), ('gt_size', 1)):
            if training and key in dataset:
                self.number(f'{where}.{key}', dataset[key], least)
        if training and 'dataset_enlarge_ratio' in dataset:
            self.number(f'{where}.dataset_enlarge_ratio', dataset['dataset_enlarge_ratio'], 1, whole=False)
        mode = dataset.get('prefetch_mode')
        if mode not in (None, 'cpu', 'cuda'):
            self.add(f"{where}.prefetch_mode: there is no '{mode}'; it is cpu, cuda or ~")
        elif mode == 'cuda' and not torch.cuda.is_available():
            self.add(f'{where}.prefetch_mode is cuda, but there is no GPU; set it to ~')
        elif mode == 'cuda' and dataset.get('pin_memory') is not True:
            self.add(f'{where}.prefetch_mode is cuda, which needs pin_memory: true')

    def check_amount(self, where: str, dataset: dict, count: int) -> None:
        """BasicSR counts an epoch's last, incomplete batch but drops it: on little data a run would end early."""
        world = self.processes
        batch = int(dataset['batch_size_per_gpu'])
        gpus = self.opt.get('num_gpu')
        if world == 1 and gpus != 0:
            there = torch.cuda.device_count()
            batch *= max(1, min(gpus, there) if isinstance(gpus, int) else there)
        ratio = dataset.get('dataset_enlarge_ratio', 1)
        drawn = math.ceil(count * ratio / world)
        total = self.subsection('train').get('total_iter')
        if not isinstance(total, (int, float)):
            return
        counted = math.ceil(count * ratio / (dataset['batch_size_per_gpu'] * world))
        iterations = (math.ceil(total / counted) + 1) * (drawn // batch)
        if iterations < total:
            enough = math.ceil(100 * batch * world / count)
            self.add(
                f'{where} gives only {drawn // batch} whole batches of {batch} an epoch, so that BasicSR would stop '
                f'after {iterations} of {total} iterations; set dataset_enlarge_ratio: {enough}'
            )

    # --- output ---

    def output_folder(self) -> Path:
        key, name = ('experiments_root', 'experiments') if self.is_train else ('results_root', 'results')
        # BasicSR's master branch lets the option file choose the folder.
        return Path(os.path.expanduser(str(self.subsection('path').get(key) or self.root / name)))

    def check_output(self) -> None:
        folder = self.output_folder()
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            if not there.is_dir():
                raise NotADirectoryError(0, 'it is not a folder')
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            self.add(f'the output folder {folder} cannot be written: {there}: {error.strerror}')


def _plain(value) -> str:
    return str(dict(value)) if isinstance(value, dict) else repr(value)
