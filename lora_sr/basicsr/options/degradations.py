"""The check of degrading on the fly: what `RealESRNetModel`, `RealESRGANModel` and `RealESRGANDataset` read."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import Check
from lora_sr.basicsr.options.dataset_content import MAX_WHOLE_FILES, check_lr_images
from lora_sr.data.lmdb_store import open_list
from lora_sr.errors import InputError

MODELS = schema.DEGRADING.split()
DATASET = schema.DEGRADED
# The stock models that take LR images from their dataset.
PAIRED_MODELS = ('SRModel', 'SwinIRModel', 'SRGANModel', 'ESRGANModel', 'DistillationModel')
PATCH = 400  # side of the GT patches of a RealESRGANDataset, fixed in its code


def misfit(check: Check, dataset: dict, training: bool) -> str:
    """What is wrong with the type of a dataset for the model; empty if nothing is."""
    kind, model = dataset.get('type'), check.opt.get('model_type')
    if kind == DATASET and not training:
        return f'a {kind} has no LR images to measure with; use a PairedImageDataset'
    if kind == DATASET and model in PAIRED_MODELS:
        return f'a {kind} has no LR images; it needs model_type: {" or ".join(MODELS)}'
    if kind == DATASET and model in MODELS and 'degrading' not in check.facts:
        return f'a {kind} has no LR images; it needs high_order_degradation: true'
    if kind in schema.PAIRS.split() and training and 'degrading' in check.facts:
        return f'{model} makes LR images itself, from a {DATASET}; for pairs set high_order_degradation: false'
    return ''


def check_degradations(check: Check) -> None:
    """Check that the keys at the top of the file fit each other."""
    opt = check.opt
    if 'degrading' not in check.facts or 'scale' not in opt:  # the dataset tells that it is missing
        return
    scale, size = opt['scale'], opt.get('gt_size')
    if not isinstance(scale, int) or scale < 1:
        return
    if PATCH % scale:
        check.add(
            f'scale is {scale}, but a {DATASET} gives patches of {PATCH} pixels, which has to be a multiple of it'
        )
    elif isinstance(size, int) and (size > PATCH or size % scale):
        check.add(f'gt_size is {size}, which has to be a multiple of scale ({scale}), and at most {PATCH}')


def check_queue(check: Check, batch: int) -> None:
    """Check that the pool of pairs is made of whole batches."""
    size = check.opt.get('queue_size', 180)
    if 'degrading' in check.facts and isinstance(size, int) and size % batch:
        check.add(
            f'queue_size is {size}, which has to be a multiple of the batch of {batch} images; '
            f'set queue_size: {(size // batch or 1) * batch}'
        )


def check_gt_dataset(check: Check, where: str, dataset: dict) -> int | None:
    """Check the values of a `RealESRGANDataset`, and its images.

    Returns the number of images, or None where something is wrong.
    """
    fit = [
        check.value(
            f'{where}.kernel_prob{end}', dataset[f'kernel_prob{end}'], schema.weights(count, 'kernel_list has as many')
        )
        for end, count in (('', len(dataset['kernel_list'])), ('2', len(dataset['kernel_list2'])))
    ]
    if not all(fit):
        return None
    problems, count = _check_images(where, dataset)
    check.problems += problems
    return count


def _check_images(where: str, dataset: dict) -> tuple[list[str], int | None]:
    root = Path(os.path.expanduser(str(dataset['dataroot_gt'])))
    kind = dataset['io_backend']['type']
    if kind == 'lmdb':
        # As a database of LR images is checked, under another name.
        problems, count = check_lr_images(where, {**dataset, 'dataroot_lq': str(root), 'lq_size': 1})
        return [problem.replace(f'{where}.dataroot_lq', f'{where}.dataroot_gt', 1) for problem in problems], count
    try:
        names = _listed_names(where, dataset)
    except InputError as error:
        return [str(error)], None
    if not root.is_dir():
        return [f'{where}.dataroot_gt: {root} {"is not a folder" if root.exists() else "does not exist"}'], None
    missing = [name for name in names if not name or not (root / name).is_file()]
    if missing:
        others = f' and {len(missing) - 1} more are' if len(missing) > 1 else ' is'
        return [f"{where}.meta_info: '{missing[0]}'{others} missing in dataroot_gt ({root})"], None
    for name in names[:: len(names) // MAX_WHOLE_FILES + 1]:
        try:
            with Image.open(root / name) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return [f'{where}.dataroot_gt: {root / name} is not an image, or a damaged one'], None
    return [], len(names)


def _listed_names(where: str, dataset: dict) -> list:
    file = os.path.expanduser(str(dataset['meta_info']))
    try:
        with open_list(file, 'utf-8') as lines:
            names = [line.strip().split(' ')[0] for line in lines]
    except InputError as error:
        raise InputError(f'{where}.meta_info: {error}') from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not a text file'
        raise InputError(f'{where}.meta_info: {file} cannot be read: {reason}') from error
    if not names:
        raise InputError(f'{where}.meta_info: {file} is empty; it has to name an image below dataroot_gt in each line')
    return names
