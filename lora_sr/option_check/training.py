"""The check of the section `train`: optimizers, losses, the scheduler, and what a distillation needs."""

import inspect

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.utils.registry import LOSS_REGISTRY

from lora_sr.basicsr_compat import find_optimizer
from lora_sr.errors import InputError
from lora_sr.models.distillation_model import (
    DATA_PARALLEL_REFUSED,
    MEMORY_FORMATS,
    NO_GROUND_TRUTH,
    affinity_layers,
    find_modules,
)
from lora_sr.option_check.check import KNOWN, Check

SCHEDULERS = {
    'MultiStepLR': MultiStepRestartLR,
    'MultiStepRestartLR': MultiStepRestartLR,
    'CosineAnnealingRestartLR': CosineAnnealingRestartLR,
}
# The section `train` of our own model takes these and no other.
DISTILLATION_TRAIN_KEYS = (
    'pixel_opt distill_pixel_opt affinity_opt memory_format ema_decay optim_g scheduler total_iter warmup_iter'
)


def check_train(check: Check) -> None:
    """Check the section `train`."""
    train = check.opt.get('train')
    if 'train' not in check.opt:
        return
    known = DISTILLATION_TRAIN_KEYS if check.ours else KNOWN['train']
    check.section('train', train, known, 'total_iter optim_g scheduler', only_known=check.ours)
    if not isinstance(train, dict):
        return
    total = train.get('total_iter')
    if 'total_iter' in train and not check.number('train.total_iter', total, 1):
        total = None
    if train.get('ema_decay') is not None and check.number('train.ema_decay', train['ema_decay'], 0, False):
        if train['ema_decay'] >= 1:
            check.add(f'train.ema_decay has to be less than 1, not {train["ema_decay"]}')
    for key, section in train.items():
        if key.startswith('optim_'):
            _check_optimizer(check, f'train.{key}', section)
        elif key.endswith('_opt') and section is not None:
            _check_loss(check, f'train.{key}', section)
    if 'scheduler' in train:
        _check_scheduler(check, train['scheduler'], total)
    if check.ours:
        _check_distillation(check, train)
    elif check.opt.get('model_type') == 'SRModel' and not (train.get('pixel_opt') or train.get('perceptual_opt')):
        check.add('train.pixel_opt and train.perceptual_opt are both missing; SRModel needs one of them')


def _check_optimizer(check: Check, where: str, section) -> None:
    if not check.is_section(where, section):
        return
    if section.get('type') is None:
        check.add(f'{where}.type is missing')
        return
    if not isinstance(section['type'], str):
        check.add(f'{where}.type has to be a name, not {section["type"]!r}')
        return
    try:
        optimizer = find_optimizer(section['type'])
    except InputError as error:
        check.add(f'{where}.type: {error}')
        return
    check.arguments(where, optimizer, section, supplied=('params',))
    if 'lr' not in section:
        if not any(problem.endswith("did you mean 'lr'?") for problem in check.problems):
            check.add(f'{where}.lr is missing')
    elif check.number(f'{where}.lr', section['lr'], 0, whole=False):
        _try_optimizer(check, where, optimizer, section)


def _try_optimizer(check: Check, where: str, optimizer: type, section: dict) -> None:
    options = {key: value for key, value in section.items() if key != 'type'}
    parameters = inspect.signature(optimizer).parameters
    if any(key not in parameters for key in options):
        return
    betas, own = options.get('betas'), getattr(parameters.get('betas'), 'default', None)
    if isinstance(betas, list) and isinstance(own, tuple) and len(betas) != len(own) and section['type'] != 'Adan':
        # torch takes the first two of three, which were meant for another optimizer.
        check.add(f'{where}.betas has {len(betas)} values; {section["type"]} takes {len(own)}, e.g. {list(own)}')
        return
    try:
        optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    except InputError as error:
        check.add(f'{where}: {error}')
    except (AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f': {str(error).splitlines()[0]}' if str(error) else ''
        check.add(f'{where}: {section["type"]} refuses these values{reason}')


def _check_loss(check: Check, where: str, section) -> None:
    if not check.is_section(where, section):
        return
    loss = check.registered(f'{where}.type', section.get('type'), LOSS_REGISTRY, 'loss')
    if loss is not None:
        ours = ('layers',) if where == 'train.affinity_opt' else ()
        # Others' losses are not built here: some fetch a network for it.
        if check.arguments(where, loss, section, ours=ours) and loss.__module__.startswith('lora_sr.'):
            try:
                loss(**{key: value for key, value in section.items() if key not in ('type', *ours)})
            except InputError as error:
                check.add(f'{where}: {error}')
            except TypeError as error:
                check.add(f'{where}: {section["type"]} refuses these values: {error}')


def _check_scheduler(check: Check, section, total) -> None:
    if not check.is_section('train.scheduler', section):
        return
    scheduler = check.registered('train.scheduler.type', section.get('type'), SCHEDULERS, 'scheduler')
    if scheduler is None or not check.arguments(
        'train.scheduler', scheduler, section, supplied=('optimizer', 'last_epoch')
    ):
        return
    for key in ('milestones', 'periods', 'restarts', 'restart_weights'):
        value = section.get(key, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, (int, float)) for item in value):
            check.add(f'train.scheduler.{key} has to be a list of numbers, not {value!r}')
            return
    pair = 'restarts' if scheduler is MultiStepRestartLR else 'periods'
    count, weights = len(section.get(pair, [0])), len(section.get('restart_weights', [1]))
    if count != weights:
        check.add(f'train.scheduler.restart_weights has {weights} values, but {pair} {count}; they have to be as many')
    if scheduler is CosineAnnealingRestartLR and total is not None and sum(section['periods']) < total:
        check.add(
            f'train.scheduler.periods add up to {sum(section["periods"])}, '
            f'which has to be at least train.total_iter ({total})'
        )


def _check_distillation(check: Check, train: dict) -> None:
    form = train.get('memory_format')
    if form is not None and form not in MEMORY_FORMATS:
        check.add(f"train.memory_format: there is no '{form}'; it is one of {', '.join(MEMORY_FORMATS)}")
    dataset = check.subsection('datasets').get('train')
    if train.get('pixel_opt') and isinstance(dataset, dict) and dataset.get('type') == 'LRImageDataset':
        check.add(NO_GROUND_TRUTH)
    affinity = train.get('affinity_opt')
    if not train.get('distill_pixel_opt') and not affinity:
        near = [
            problem for problem in check.problems if "'distill_pixel_opt'?" in problem or "'affinity_opt'?" in problem
        ]
        if not near:
            check.add(
                'train.distill_pixel_opt and train.affinity_opt are both missing; without one of them nothing '
                'is learned from the teacher'
            )
    if not isinstance(affinity, dict):
        return
    if check.processes == 1 and _gpus(check) > 1:
        check.add(DATA_PARALLEL_REFUSED)
    try:
        names = affinity_layers(affinity.get('layers'))
    except InputError as error:
        check.add(error)
        return
    for role, key in (('student', 'network_g'), ('teacher', 'network_t')):
        if key in check.networks:
            try:
                # The teacher has been folded, as it will be in the run: other names may be gone, or new.
                find_modules(check.networks[key], names[role], role)
            except InputError as error:
                check.add(error)


def _gpus(check: Check) -> int:
    """How many GPUs this process is to use."""
    gpus = check.opt.get('num_gpu')
    return torch.cuda.device_count() if gpus == 'auto' else gpus if isinstance(gpus, int) else 0
