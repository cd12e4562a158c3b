"""The check of degrading on the fly: what `RealESRNetModel`, `RealESRGANModel` and `RealESRGANDataset` read."""

import os
from pathlib import Path

from PIL import Image

from lora_sr.basicsr.options.check import Check
from lora_sr.basicsr.options.dataset_content import MAX_WHOLE_FILES, check_lr_images
from lora_sr.errors import InputError

MODELS = ('RealESRNetModel', 'RealESRGANModel')
DATASET = 'RealESRGANDataset'
# The stock models that take LR images from their data set.
PAIRED_MODELS = ('SRModel', 'SwinIRModel', 'SRGANModel', 'ESRGANModel', 'DistillationModel')
PATCH = 400  # side of the GT patches of a RealESRGANDataset, fixed in its code
BLURS = 'iso aniso generalized_iso generalized_aniso plateau_iso plateau_aniso'.split()

# Keys at the top of the file, by what they hold. The second degradation has the same keys with a 2 at their end.
_PROBABILITIES = 'gaussian_noise_prob gray_noise_prob'
_RANGES = {'resize_range': 0, 'noise_range': 0, 'poisson_scale_range': 0, 'jpeg_range': 1}  # and the least value
_SHARPENED = {'RealESRNetModel': 'gt_usm', 'RealESRGANModel': 'l1_gt_usm percep_gt_usm gan_gt_usm'}
# Keys of the data set.
_BLUR = 'blur_kernel_size kernel_list kernel_prob blur_sigma betag_range betap_range sinc_prob'
_DATASET_KEYS = f'{_BLUR} {" ".join(f"{key}2" for key in _BLUR.split())} final_sinc_prob'


def degrades(check: Check) -> bool:
    """Whether the model of a training makes its LR images itself."""
    opt = check.opt
    return check.is_train and opt.get('model_type') in MODELS and bool(opt.get('high_order_degradation', True))


def top_keys(check: Check) -> tuple:
    """The keys that the model reads at the top of the file: those without defaults, and the others."""
    model = check.opt.get('model_type')
    if not check.is_train or model not in MODELS:
        return '', ''
    keys = _SHARPENED[model] if model == 'RealESRGANModel' or degrades(check) else ''
    if degrades(check):
        first = f'resize_prob {_PROBABILITIES} {" ".join(_RANGES)}'.split()
        keys += f' {" ".join(first)} second_blur_prob {" ".join(f"{key}2" for key in first)} gt_size'
    return keys, 'high_order_degradation queue_size'


def dataset_keys(dataset: dict) -> str:
    """The keys that a `RealESRGANDataset` reads beside those that every data set has, without defaults."""
    backend = dataset.get('io_backend')
    is_database = isinstance(backend, dict) and backend.get('type') == 'lmdb'
    return _DATASET_KEYS if is_database else f'meta_info {_DATASET_KEYS}'


def misfit(check: Check, dataset: dict, training: bool) -> str:
    """What is wrong with the type of a data set for the model; empty if nothing is."""
    kind, model = dataset.get('type'), check.opt.get('model_type')
    if kind == DATASET and not training:
        return f'a {kind} has no LR images to measure with; use a PairedImageDataset'
    if kind == DATASET and model in PAIRED_MODELS:
        return f'a {kind} has no LR images; it needs model_type: {" or ".join(MODELS)}'
    if kind == DATASET and model in MODELS and not degrades(check):
        return f'a {kind} has no LR images; it needs high_order_degradation: true'
    if kind == 'PairedImageDataset' and training and degrades(check):
        return f'{model} makes LR images itself, from a {DATASET}; for pairs set high_order_degradation: false'
    return ''


def check_degradations(check: Check) -> None:
    """Check the values of the keys at the top of the file."""
    opt = check.opt
    for key in [key for key in top_keys(check)[0].split() if key in opt]:
        first = key.rstrip('2')
        if key.endswith('_usm'):
            if not isinstance(opt[key], bool):
                check.add(f'{key} has to be true or false, not {opt[key]!r}')
        elif first == 'resize_prob':
            _check_weights(check, key, opt[key], 3, ' (up, down, as it is)')
        elif first in _RANGES:
            _check_range(check, key, opt[key], _RANGES[first])
        elif first.endswith('_prob'):
            _check_probability(check, key, opt[key])
    if not degrades(check):
        return
    scale, size = opt.get('scale'), opt.get('gt_size')
    if 'scale' not in opt:
        return  # the data set tells it
    if isinstance(scale, int) and scale > 0 and PATCH % scale:
        check.add(
            f'scale is {scale}, but a {DATASET} gives patches of {PATCH} pixels, which has to be a multiple of it'
        )
    elif 'gt_size' in opt and check.number('gt_size', size, 1) and isinstance(scale, int) and scale > 0:
        if size > PATCH or size % scale:
            check.add(f'gt_size is {size}, which has to be a multiple of scale ({scale}), and at most {PATCH}')
    if opt.get('queue_size') is not None:
        check.number('queue_size', opt['queue_size'], 1)


def check_queue(check: Check, batch: int) -> None:
    """Check that the pool of pairs is made of whole batches."""
    size = check.opt.get('queue_size', 180)
    if degrades(check) and isinstance(size, int) and size % batch:
        check.add(
            f'queue_size is {size}, which has to be a multiple of the batch of {batch} images; '
            f'set queue_size: {(size // batch or 1) * batch}'
        )


def check_gt_dataset(check: Check, where: str, dataset: dict):
    """Check the values of a `RealESRGANDataset`, and its images.

    Returns the number of images, or None where something is wrong.
    """
    before = len(check.problems)
    for end in ('', '2'):
        blurs, weights = (f'{where}.kernel_{name}{end}' for name in ('list', 'prob'))
        given = dataset[f'kernel_list{end}']
        if not isinstance(given, (list, tuple)) or not given or not all(blur in BLURS for blur in given):
            check.add(f'{blurs} has to be a list of {", ".join(BLURS)}, not {given!r}')
        else:
            _check_weights(check, weights, dataset[f'kernel_prob{end}'], len(given), ' (kernel_list has as many)')
        _check_range(check, f'{where}.blur_sigma{end}', dataset[f'blur_sigma{end}'], 0, differ=True)
        for key in (f'betag_range{end}', f'betap_range{end}'):
            _check_range(check, f'{where}.{key}', dataset[key], 0)
    for key in ('sinc_prob', 'sinc_prob2', 'final_sinc_prob'):
        _check_probability(check, f'{where}.{key}', dataset[key])
    if len(check.problems) > before:
        return None
    problems, count = _check_images(where, dataset)
    check.problems += problems
    return count


def _check_images(where: str, dataset: dict):
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
        with open(file, encoding='utf-8') as lines:
            names = [line.strip().split(' ')[0] for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not a text file'
        raise InputError(f'{where}.meta_info: {file} cannot be read: {reason}') from error
    if not names:
        raise InputError(f'{where}.meta_info: {file} is empty; it has to name an image below dataroot_gt in each line')
    return names


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_probability(check: Check, where: str, value) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        check.add(f'{where} has to be a number from 0 to 1, not {value!r}')


def _check_range(check: Check, where: str, value, least: float, differ: bool = False) -> None:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    if not good or not least <= value[0] <= value[1] or (differ and value[0] == value[1]):
        more = 'more than' if differ else 'at least'
        check.add(f'{where} has to be two numbers from {least}, the second {more} the first, not {_plain(value)}')


def _check_weights(check: Check, where: str, value, count: int, which: str) -> None:
    good = isinstance(value, (list, tuple)) and len(value) == count and all(map(_is_number, value))
    if not good or min(value) < 0 or sum(value) <= 0:
        check.add(f'{where} has to be {count} weights{which} of at least 0 that are not all 0, not {_plain(value)}')


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else repr(value)
