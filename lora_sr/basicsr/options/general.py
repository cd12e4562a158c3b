"""The check of the top level of an option file, and of the sections `logger` and `val`."""

import os

import torch
from basicsr.utils.registry import METRIC_REGISTRY, MODEL_REGISTRY

from lora_sr.basicsr.metrics import is_iqa_metric, prepare_metric
from lora_sr.basicsr.options.check import KNOWN, Check
from lora_sr.basicsr.options.degradations import check_degradations, top_keys
from lora_sr.basicsr.options.training import GAN_MODELS
from lora_sr.errors import InputError


def check_top(check: Check) -> None:
    """Check the keys of the top level, and those of them that are no sections."""
    opt = check.opt
    required = 'name model_type num_gpu datasets network_g path' + (' train logger' if check.is_train else ' val')
    if check.is_train and opt.get('model_type') in GAN_MODELS:
        required += ' network_d'
    degradations, optional = top_keys(check)
    check.section('', opt, f'{KNOWN[""]} {degradations} {optional}', f'{required} {degradations}')
    check_degradations(check)
    if 'name' in opt and (not isinstance(opt['name'], str) or not opt['name'] or os.sep in opt['name']):
        check.add(f'name has to be the name of a folder, not {opt["name"]!r}')
    if 'model_type' in opt:
        check.registered('model_type', opt['model_type'], MODEL_REGISTRY, 'model')
    if 'scale' in opt:
        check.number('scale', opt['scale'], 1)
    gpus = opt.get('num_gpu')
    if 'num_gpu' in opt and gpus != 'auto' and check.number('num_gpu', gpus):
        there = torch.cuda.device_count()
        if gpus > there and not (check.processes > 1 and there):
            check.add(f'num_gpu is {gpus}, but this machine has {there}; 0 is for the CPU, auto for what is there')
    if not check.ours and check.is_train and 'network_t' in opt:
        check.add('network_t, a teacher, is for a DistillationModel alone; set model_type: DistillationModel')
    if check.ours and check.is_train and 'network_t' not in opt:
        check.add('network_t, the teacher of a DistillationModel, is missing')


def check_logger(check: Check) -> None:
    """Check the section `logger`."""
    logger = check.opt.get('logger')
    if 'logger' not in check.opt:
        return
    check.section('logger', logger, KNOWN['logger'], 'print_freq save_checkpoint_freq use_tb_logger')
    for key in ('print_freq', 'save_checkpoint_freq'):
        if isinstance(logger, dict) and key in logger:
            check.number(f'logger.{key}', logger[key], 1)


def check_val(check: Check) -> None:
    """Check the section `val`."""
    val = check.opt.get('val')
    if val is None:
        return
    required = 'val_freq save_img' if check.is_train else 'save_img'
    if isinstance(val, dict) and not check.is_train and val.get('save_img'):
        required += ' suffix'
    check.section('val', val, KNOWN['val'], required)
    if not isinstance(val, dict):
        return
    if check.is_train and 'val_freq' in val:
        check.number('val.val_freq', val['val_freq'], 1)
    metrics = val.get('metrics')
    if metrics is not None and not isinstance(metrics, dict):
        check.add(f'val.metrics has to be a section of keys, not {metrics!r}')
        return
    for name, section in (metrics or {}).items():
        where = f'val.metrics.{name}'
        if not check.is_section(where, section):
            continue
        metric = check.registered(f'{where}.type', section.get('type'), METRIC_REGISTRY, 'metric')
        if metric is not None:
            complete = check.arguments(where, metric, section, ours=('better',), supplied=('img', 'img2'))
            _check_better(check, where, section, metric)
            if complete and is_iqa_metric(metric):
                try:
                    prepare_metric(metric)
                except InputError as error:
                    check.add(f'{where}: {error}')


def _check_better(check: Check, where: str, section: dict, metric) -> None:
    """BasicSR takes anything but `higher` for `lower`, and `higher` where nothing is said."""
    better = section.get('better', 'higher')
    if better not in ('higher', 'lower'):
        check.add(f'{where}.better has to be higher or lower, not {better!r}')
    elif is_iqa_metric(metric) and better != 'lower':
        check.add(f'{where}.better has to be lower, since less is better in {section["type"]}')
