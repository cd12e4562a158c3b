"""The check of the section `datasets`."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from basicsr.utils.registry import DATASET_REGISTRY

from lora_sr.basicsr.datasets import PAIRED_KEYS, roots_of
from lora_sr.basicsr.options import degradations, schema
from lora_sr.basicsr.options.check import Check
from lora_sr.basicsr.options.dataset_content import check_lr_images, check_pairs

# Which keys of a dataset may be lists.
ROOTS_IN_LISTS = {
    **dict.fromkeys(schema.PAIRS.split(), PAIRED_KEYS),
    **dict.fromkeys(schema.LR_ALONE.split(), ('dataroot_lq',)),
}
LONGEST_EPOCH = 10**8  # patches: BasicSR shuffles all of them in memory


def check_datasets(check: Check) -> None:
    """Check the section `datasets`, and the datasets themselves."""
    datasets = check.opt.get('datasets')
    if 'datasets' not in check.opt:
        return
    if not isinstance(datasets, dict) or not datasets:
        check.add(f'datasets has to be a section of datasets, not {datasets!r}')
        return
    known_names = {str(name).split('_')[0] for name in datasets} <= {'train', 'val'}
    if check.is_train and 'train' not in datasets and known_names:  # of another name, it is told that it is wrong
        check.add(f'datasets.train is missing; the datasets are {", ".join(map(str, datasets))}')
    for name, dataset in datasets.items():
        phase = str(name).split('_')[0]
        if phase not in (('train', 'val') if check.is_train else ('val', 'test', 'train')):
            allowed = 'train or val, val_2, …' if check.is_train else 'test, test_2, …'
            check.add(f'datasets.{name}: a dataset is named {allowed}')
        elif check.is_train or phase != 'train':
            _check_dataset(check, f'datasets.{name}', dataset, phase == 'train')
        elif isinstance(dataset, dict) and dataset.get('type') in schema.LR_ALONE.split():
            named = schema.with_article(dataset['type'])
            check.add(
                f'datasets.{name} must be left out of a test, for {named} has no ground truth to measure with: '
                f'--force_yml datasets:{name}=~'
            )
    _check_names(check, datasets)


def _check_names(check: Check, datasets: dict) -> None:
    """The best metrics, the curves and the images of a validation set go by its name."""
    named: dict[str, str] = {}
    for key, dataset in datasets.items():
        name = dataset.get('name') if isinstance(dataset, dict) and key != 'train' else None
        if isinstance(name, str) and named.setdefault(name, key) != key:
            check.add(f'datasets.{key}.name must differ from that of datasets.{named[name]}, got {name} for both')


def _check_dataset(check: Check, where: str, dataset: Any, training: bool) -> None:
    if not check.is_section(where, dataset):
        return
    kind = dataset.get('type')
    paired, unpaired = kind in schema.PAIRS.split(), kind in schema.LR_ALONE.split()
    if unpaired:
        named = schema.with_article(kind)
        if not training:
            check.add(f'{where}: {named} has no ground truth to measure with; use a {schema.paired_with(kind)}')
            return
        if not check.facts & {'open', schema.DISTILLATION}:
            check.add(f'{where}: {named} has no ground truth; it needs a teacher, model_type: DistillationModel')
            return
    model = check.opt.get('model_type')
    if not training and model in f'{schema.VIDEO} {schema.VIDEO_GAN}'.split() and dataset.get('type') in schema.IMAGES:
        check.add(f'{where}.type has to be a dataset of videos for a {model}, not {dataset["type"]}')
        return
    misfit = degradations.misfit(check, dataset, training)
    if misfit:
        check.add(f'{where}: {misfit}')
        return
    degraded = dataset.get('type') == degradations.DATASET
    facts = {'train' if training else 'test', *check.readers(DATASET_REGISTRY, dataset.get('type'), schema.DATASETS)}
    backend = dataset.get('io_backend')
    if isinstance(backend, dict) and backend.get('type') == 'disk':
        facts.add('folder')
    complete = check.section(where, dataset, facts)
    if 'open' not in facts and schema.BACKEND.holds(backend):
        complete &= check.section(f'{where}.io_backend', backend, {'train', str(backend.get('type'))})
    if 'type' in dataset:
        check.registered(f'{where}.type', dataset['type'], DATASET_REGISTRY, 'dataset')
    before = len(check.problems)
    if kind in (schema.RAW_PAIRED, schema.RAW_LR) and complete and backend['type'] != 'lmdb':
        check.add(f'{where}.io_backend must be {{type: lmdb}} for a {kind}, got {{type: {backend["type"]}}}')
    if 'blend_alpha' in dataset and not dataset.get('blend_prob'):
        check.add(f'{where}.blend_alpha needs a blend_prob of more than 0')
    if 'open' not in facts:
        _refuse_lists(check, where, dataset, ROOTS_IN_LISTS.get(dataset.get('type'), ()))
    _check_loading(check, where, dataset)
    if not (paired or unpaired or degraded) or (complete and backend['type'] == 'memcached'):
        for key in [key for key in dataset if key.startswith('dataroot')]:
            for root in dict.fromkeys(root for root in roots_of(dataset[key]) if isinstance(root, str)):
                if not os.path.exists(os.path.expanduser(root)):
                    check.add(f'{where}.{key}: {root} does not exist')
        return
    if unpaired:
        if complete and len(check.problems) == before:
            problems, count = check_lr_images(where, dataset)
            check.problems += problems
            if count is not None:
                _check_amount(check, where, dataset, count)
        return
    if degraded and complete and len(check.problems) == before:
        count = degradations.check_gt_dataset(check, where, dataset)
        degradations.check_queue(check, _batch(check, dataset))
        if count is not None:
            _check_amount(check, where, dataset, count)
    scale = check.opt.get('scale')
    if scale is None:
        if 'scale is missing' not in check.problems:
            check.add_missing('scale is missing', 'scale')
        return
    if degraded or not complete or len(check.problems) > before or not isinstance(scale, int) or scale < 1:
        return
    if training and dataset['gt_size'] % scale:
        check.add(f'{where}.gt_size is {dataset["gt_size"]}, which has to be a multiple of scale ({scale})')
        return
    problems, pairs = check_pairs(where, dataset, scale, training)
    check.problems += problems
    if pairs is not None and training:
        _check_amount(check, where, dataset, pairs.total)
    elif pairs is not None:
        check.lr_sizes[where] = {lr: name for name, _, lr in reversed(pairs)}  # the first of each size
        if check.subsection('val').get('save_img') is True and pairs.namesakes:
            name, first, second = pairs.namesakes
            check.add(
                f"{where} must have images of different names to save them, got '{name}' in {first} and in {second}: "
                'make a dataset of each root, or set val.save_img: false'
            )


def _refuse_lists(check: Check, where: str, dataset: dict, taken: tuple[str, ...]) -> None:
    for key in PAIRED_KEYS:
        if isinstance(dataset.get(key), (list, tuple)) and key not in taken:
            check.add(f'{where}.{key} of a {dataset["type"]} must be one path, got a list')


def _check_loading(check: Check, where: str, dataset: dict) -> None:
    if dataset.get('persistent_workers') is True and dataset.get('num_worker_per_gpu') == 0:
        check.add(f'{where}.persistent_workers needs workers; raise num_worker_per_gpu, or set it to false')
    mode = dataset.get('prefetch_mode')
    if mode == 'cuda' and not torch.cuda.is_available():
        check.add(f'{where}.prefetch_mode is cuda, but there is no GPU; set it to ~')
    elif mode == 'cuda' and dataset.get('pin_memory') is not True:
        check.add(f'{where}.prefetch_mode is cuda, which needs pin_memory: true')


def _check_amount(check: Check, where: str, dataset: dict, count: int) -> None:
    """A loader drops the last, incomplete batch of an epoch: of too little data that is all there is."""
    batch, ratio = _batch(check, dataset), dataset.get('dataset_enlarge_ratio', 1)
    if not schema.is_number(ratio):  # which has been told
        return
    drawn = math.ceil(count * ratio / check.processes)
    if drawn > LONGEST_EPOCH:
        most = LONGEST_EPOCH * check.processes // count
        check.add(f'{where}.dataset_enlarge_ratio must be at most {most:,} for {count:,} images, got {ratio:,}')
    if drawn < batch:
        enough = math.ceil(100 * batch * check.processes / count)
        check.add(
            f'{where}.batch_size_per_gpu must be at most {drawn}, the patches of an epoch, got {batch}; raise '
            f'dataset_enlarge_ratio to {min(enough, LONGEST_EPOCH)}, say'
        )


def _batch(check: Check, dataset: dict) -> int:
    """How many images a process draws at once."""
    batch, gpus = int(dataset['batch_size_per_gpu']), check.opt.get('num_gpu')
    if check.processes == 1 and gpus != 0:
        there = torch.cuda.device_count()
        batch *= max(1, min(gpus, there) if isinstance(gpus, int) else there)
    parts = check.subsection('train').get('accumulate_iter')
    return batch * parts if isinstance(parts, int) and parts > 0 else batch
