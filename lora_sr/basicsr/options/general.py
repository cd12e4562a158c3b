"""The check of the top level of an option file, and of the sections `logger` and `val`."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from basicsr.utils.registry import METRIC_REGISTRY, MODEL_REGISTRY

from lora_sr.archs.info import network_info
from lora_sr.basicsr.metrics import is_iqa_metric, lower_is_better, prepare_metric
from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import OWN_MODULES, Check
from lora_sr.basicsr.options.degradations import check_degradations
from lora_sr.errors import InputError


def check_top(check: Check) -> None:
    """Check the keys of the top level, and those of them that are no sections."""
    opt = check.opt
    # Not of the file: whoever reads the command line puts it here.
    check.section('', {key: value for key, value in opt.items() if key != 'auto_resume'})
    check_degradations(check)
    if 'model_type' in opt:
        check.registered('model_type', opt['model_type'], MODEL_REGISTRY, 'model')
    gpus: Any = opt.get('num_gpu')
    there = torch.cuda.device_count()
    if schema.is_number(gpus) and gpus > there and not (check.processes > 1 and there):
        check.add(f'num_gpu is {gpus}, but this machine has {there}; 0 is for the CPU, auto for what is there')
    if not check.facts & {'open', schema.DISTILLATION} and check.is_train and 'network_t' in opt:
        check.add('network_t, a teacher, is for a DistillationModel alone; set model_type: DistillationModel')
    if 'dist_params' in opt:
        check.section('dist_params', opt['dist_params'], check.facts - {'open'})


def check_logger(check: Check) -> None:
    """Check the section `logger`."""
    if 'logger' not in check.opt:
        return
    logger, facts = check.opt['logger'], check.facts - {'open'}
    check.section('logger', logger, facts)
    wandb = logger.get('wandb') if isinstance(logger, dict) else None
    if wandb is not None and check.section('logger.wandb', wandb, facts):
        if wandb.get('project') is not None and logger.get('use_tb_logger') is False:
            check.add('logger.wandb copies what TensorBoard gets; set logger.use_tb_logger: true')
        elif wandb.get('project') is not None and importlib.util.find_spec('wandb') is None:
            check.add('logger.wandb needs wandb, which is not installed: pip install wandb')
    if isinstance(logger, dict) and logger.get('use_tb_logger') is True:
        if importlib.util.find_spec('tensorboard') is None:
            check.add('logger.use_tb_logger needs tensorboard, which is not installed: pip install tensorboard')
    if isinstance(logger, dict):
        _check_kept(check, logger)


def _check_kept(check: Check, logger: dict) -> None:
    """Check what is kept of validations."""
    metrics = check.subsection('val').get('metrics')
    best, names = logger.get('keep_best'), list(metrics) if isinstance(metrics, dict) else []
    if isinstance(best, str) and best not in names:
        known = ', '.join(map(str, names)) or 'there is none'
        check.add_missing(f"logger.keep_best has to be a name in val.metrics ({known}), not '{best}'", 'val.metrics')
    if logger.get('save_images_to_tb') is True and logger.get('use_tb_logger') is False:
        check.add('logger.save_images_to_tb needs TensorBoard; set logger.use_tb_logger: true')


def check_val(check: Check) -> None:
    """Check the section `val`."""
    val = check.opt.get('val')
    if val is None:
        return
    saving = {'saving'} if isinstance(val, dict) and val.get('save_img') else set()
    check.section('val', val, check.facts | saving)
    if not isinstance(val, dict):
        return
    _check_tile(check, val)
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
            _check_better(check, where, section)
            if metric.__module__.startswith(OWN_MODULES) and 'crop_border' in section:
                check.value(f'{where}.crop_border', section['crop_border'], schema.BORDER)
            _check_ground_truth(check, where, section, metric)
            if complete and is_iqa_metric(metric):
                try:
                    prepare_metric(metric)
                except InputError as error:
                    check.add(f'{where}: {error}')


def _check_tile(check: Check, val: dict) -> None:
    network = check.networks.get('network_g')
    if val.get('tile') is None or network is None:
        return
    info = network_info(network)
    if info is None or info.fixed_size is not None:
        check.add(f'val.tile needs a network that takes images of any size; leave it out for {type(network).__name__}')


def _check_ground_truth(check: Check, where: str, section: dict, metric: Callable) -> None:
    if inspect.signature(metric).parameters.get('img2', inspect.Parameter.empty) is inspect.Parameter.empty:
        return
    for key, dataset in check.subsection('datasets').items():
        if key != 'train' and isinstance(dataset, dict) and dataset.get('type') == 'SingleImageDataset':
            check.add(
                f'{where}: {section["type"]} compares with a ground truth, which datasets.{key}, a SingleImageDataset, '
                f'does not have; leave the metric out, or take calculate_niqe'
            )


def _check_better(check: Check, where: str, section: dict) -> None:
    """BasicSR takes anything but `higher` for `lower`."""
    less = lower_is_better(section['type'])
    better = section.get('better', 'lower' if less else 'higher')
    if better not in ('higher', 'lower'):
        check.add(f'{where}.better has to be higher or lower, not {better!r}')
    elif less and better != 'lower':
        check.add(f'{where}.better has to be lower, since less is better in {section["type"]}')
