"""The check of the section `train`: optimizers, losses, the scheduler, and what a distillation needs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from basicsr.archs import vgg_arch
from basicsr.losses.basic_loss import PerceptualLoss
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY

from lora_sr.basicsr.options import distillation, schema
from lora_sr.basicsr.options.check import Check, find
from lora_sr.basicsr.options.step import check_step
from lora_sr.basicsr.patches.optimizers import find_optimizer
from lora_sr.checkpoints.building import construct, refused_key
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.errors import InputError
from lora_sr.optim import Adan

SCHEDULERS = {
    'MultiStepLR': MultiStepRestartLR,
    'MultiStepRestartLR': MultiStepRestartLR,
    'CosineAnnealingRestartLR': CosineAnnealingRestartLR,
}


def check_train(check: Check) -> None:
    """Check the section `train`."""
    train = check.opt.get('train')
    if 'train' in check.opt:
        check.section('train', train)
    if check.ours:
        _check_distillation_options(check)
    if isinstance(train, dict):
        check_step(check, train)
        _check_parts(check, train)


def _check_parts(check: Check, train: dict) -> None:
    for key, section in train.items():
        if key.startswith('optim_'):
            _check_optimizer(check, f'train.{key}', section)
        elif key.endswith('_opt') and section is not None:
            _check_loss(check, f'train.{key}', section)
    if 'scheduler' in train:
        _check_scheduler(check, train['scheduler'], train.get('total_iter'))
    model = check.opt.get('model_type')
    if check.ours:
        _check_affinity(check, train)
    elif model in schema.PLAIN.split() and not (train.get('pixel_opt') or train.get('perceptual_opt')):
        keys = ('train.pixel_opt', 'train.perceptual_opt')
        check.add_missing(f'{" and ".join(keys)} are both missing; {model} needs one of them', *keys)
    elif model in schema.GAN.split():
        _check_gan(check, train)


def _check_optimizer(check: Check, where: str, section: Any) -> None:
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
    if not check.arguments(where, optimizer, section, supplied=('params',)) and 'lr' in section:
        return
    if 'lr' not in section:
        check.add_missing(f'{where}.lr is missing', f'{where}.lr')
    elif check.value(f'{where}.lr', section['lr'], schema.number()):
        _try_optimizer(check, where, optimizer, section)


def _try_optimizer(check: Check, where: str, optimizer: type, section: dict) -> None:
    options = {key: value for key, value in section.items() if key != 'type'}
    parameters = inspect.signature(optimizer).parameters
    if any(key not in parameters for key in options):
        return
    betas, own = options.get('betas'), getattr(parameters.get('betas'), 'default', None)
    if isinstance(betas, list) and isinstance(own, tuple) and len(betas) != len(own) and optimizer is not Adan:
        # torch takes the first two of three, which were meant for another optimizer.
        check.add(f'{where}.betas has {len(betas)} values; {section["type"]} takes {len(own)}, e.g. {list(own)}')
        return
    try:
        optimizer([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    except InputError as error:
        check.add(f'{where}: {error}')
    except Exception as error:  # a package may have classes of its own
        reason = f': {str(error).splitlines()[0]}' if str(error) else ''
        check.add(
            _refusal(
                where, section['type'], partial(optimizer, [torch.nn.Parameter(torch.zeros(2, 2))]), options, reason
            )
        )


def _check_loss(check: Check, where: str, section: Any) -> None:
    if not check.is_section(where, section):
        return
    loss = check.registered(f'{where}.type', section.get('type'), LOSS_REGISTRY, 'loss')
    if loss is None:
        return
    ours = ('layers',) if where == 'train.affinity_opt' else ()
    if not check.arguments(where, loss, section, ours=ours):
        return
    if loss is PerceptualLoss:
        _check_perceptual(check, where, section)
    elif loss.__module__.startswith(('lora_sr.', 'basicsr.')):  # others' are not built: some fetch a network for it
        arguments = {key: value for key, value in section.items() if key not in ('type', *ours)}
        try:
            loss(**arguments)
        except InputError as error:
            check.add(f'{where}: {error}')
        except (TypeError, ValueError, NotImplementedError) as error:
            check.add(_refusal(where, section['type'], loss, arguments, f': {error}'))


def _refusal(where: str, kind: str, build: Callable[..., object], arguments: dict, reason: str) -> str:
    key = refused_key(build, arguments)
    quoted = [name for name, value in arguments.items() if f' {value} ' in f'{reason} ']
    if key is None and len(quoted) == 1:  # none can do without it, but the reason says what it is
        key = quoted[0]
    if key is None:
        return f'{where}: {kind} refuses these values{reason}'
    return f'{where}.{key}: {kind} refuses {arguments[key]!r}{reason}'


def _check_perceptual(check: Check, where: str, section: dict) -> None:
    """Check the layers of a `PerceptualLoss`, and that the weights of its VGG are on the disk and fit it."""
    kind, weights = section.get('vgg_type', 'vgg19'), section['layer_weights']
    names = vgg_arch.NAMES.get(str(kind).replace('_bn', ''))
    if names is None or not hasattr(torchvision.models, kind):
        kinds = [name + end for name in vgg_arch.NAMES for end in ('', '_bn')]
        check.add(f"{where}.vgg_type: there is no network '{kind}'; known are {', '.join(kinds)}")
        return
    if kind.endswith('_bn'):
        names = vgg_arch.insert_bn(names)
    if not isinstance(weights, dict) or not weights:
        check.add(f'{where}.layer_weights has to be a section of layers, e.g. {{conv5_4: 1}}, not {weights!r}')
        return
    for name in [name for name in weights if name not in names]:
        near = ' or '.join(difflib.get_close_matches(str(name), names, n=3)) or ', '.join(names)
        check.add(f"{where}.layer_weights: there is no layer '{name}' in {kind}; did you mean {near}?")
    check.value(f'{where}.criterion', section.get('criterion', 'l1'), schema.one_of('l1', 'l2', 'fro'))
    _check_vgg_file(check, where, kind)


def _check_vgg_file(check: Check, where: str, kind: str) -> None:
    # BasicSR reads a file of this name, VGG19's, for every kind, if it is there; else torchvision its own.
    own = check.root / vgg_arch.VGG_PRETRAIN_PATH
    url = torchvision.models.get_model_weights(kind).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / url.rpartition('/')[2]
    if not own.exists() and not cached.exists():
        folder = (own if own.name == cached.name else cached).parent
        check.add(
            f"{where} needs the weights of {kind}: put torchvision's {cached.name} ({url}) into {folder}, or train "
            f'without {where.rpartition(".")[2]}'
        )
        return
    file = own if own.exists() else cached
    try:
        content = read_checkpoint(file)
    except InputError as error:
        check.add(f'{where}: {error}')
        return
    with torch.device('meta'):
        expected = getattr(torchvision.models, kind)().state_dict()
    for key, value in expected.items():
        if not key.endswith('num_batches_tracked') and getattr(content.get(key), 'shape', None) != value.shape:
            there = f'of shape {tuple(content[key].shape)}' if hasattr(content.get(key), 'shape') else 'not there'
            more = f'; BasicSR reads it for every vgg_type: put it elsewhere, or set vgg_type: {own.name.split("-")[0]}'
            check.add(f'{where}: {file} does not fit {kind}: {key} is {there}{more if file == own else ""}')
            return


def _check_gan(check: Check, train: dict) -> None:
    if 'gan_opt' in train and train['gan_opt'] is None:
        check.add('train.gan_opt is missing')
    if check.opt['model_type'] == 'RealESRGANModel' and train.get('ldl_opt') and not train.get('ema_decay'):
        check.add('train.ldl_opt compares with the average of the weights; set train.ema_decay, e.g. to 0.999')
    _check_discriminator(check)


def _check_discriminator(check: Check) -> None:
    """Check that BasicSR's own discriminators can be built, and take patches of the training's size."""
    section, data = check.subsection('network_d'), check.subsection('datasets').get('train')
    size = (check.opt if 'degrading' in check.facts else data if isinstance(data, dict) else {}).get('gt_size')
    kind = section.get('type')
    arch = find(ARCH_REGISTRY, kind)
    if (
        arch is None
        or getattr(arch, '__module__', '') != 'basicsr.archs.discriminator_arch'
        or not isinstance(size, int)
        or size < 1
    ):
        return
    if any(problem.startswith(('network_d', 'gt_size')) for problem in check.problems):
        return
    with torch.device('meta'):  # shapes alone
        try:
            network = construct(arch, section, 'network_d').eval()
        except InputError as error:
            check.add(error)
            return
        try:
            network(torch.zeros(1, section['num_in_ch'], size, size))
        except Exception as error:
            # Where sizes are told, or else where halves that were rounded down do not meet their wholes again.
            reason = error if isinstance(error, AssertionError) else 'it has to be a multiple of 8'
            check.add(f'network_d: {kind} does not take patches of gt_size {size}: {reason}')


def _check_scheduler(check: Check, section: Any, total: Any) -> None:
    if not check.is_section('train.scheduler', section):
        return
    scheduler = check.registered('train.scheduler.type', section.get('type'), SCHEDULERS, 'scheduler')
    if scheduler is None or not check.arguments(
        'train.scheduler', scheduler, section, supplied=('optimizer', 'last_epoch')
    ):
        return
    for key in ('milestones', 'periods', 'restarts', 'restart_weights'):
        value = section.get(key, [])
        if not isinstance(value, (list, tuple)) or not all(map(schema.is_number, value)):
            check.add(f'train.scheduler.{key} has to be a list of numbers, not {value!r}')
            return
    for key in ('eta_min', 'gamma'):
        if key in section and not (schema.is_number(section[key]) and section[key] >= 0):
            check.add(f'train.scheduler.{key} has to be a number of at least 0, not {section[key]!r}')
    pair = 'restarts' if scheduler is MultiStepRestartLR else 'periods'
    count, weights = len(section.get(pair, [0])), len(section.get('restart_weights', [1]))
    if count != weights:
        check.add(f'train.scheduler.restart_weights has {weights} values, but {pair} {count}; they have to be as many')
    if scheduler is CosineAnnealingRestartLR and schema.is_number(total) and sum(section['periods']) < total:
        check.add(
            f'train.scheduler.periods add up to {sum(section["periods"])}, '
            f'which has to be at least train.total_iter ({total})'
        )


def _check_distillation_options(check: Check) -> None:
    for keys, sentence in distillation.option_faults(check.opt).items():
        told = tuple(f'{name} ' for key in keys.split() for name in (key.partition('.')[0], key))
        if not any(problem.startswith(told) for problem in check.problems):  # the key, or the section that holds it
            check.add_missing(sentence, *keys.split())


def _check_affinity(check: Check, train: dict) -> None:
    affinity = train.get('affinity_opt')
    if not isinstance(affinity, dict) or 'train.affinity_opt.layers.' in check.misspelled.values():
        return
    gpus: Any = check.opt.get('num_gpu')
    gpus = torch.cuda.device_count() if gpus == 'auto' else gpus
    if check.processes == 1 and schema.is_number(gpus) and gpus > 1:
        check.add(distillation.DATA_PARALLEL_REFUSED)
    try:
        names = distillation.affinity_layers(affinity.get('layers'))
    except InputError as error:
        check.add(error)
        return
    for role, key in (('student', 'network_g'), ('teacher', 'network_t')):
        if key in check.networks:
            try:
                # The teacher has been folded, as it will be in the run: other names may be gone, or new.
                distillation.find_modules(check.networks[key], names[role], role)
            except InputError as error:
                check.add(error)
