"""What an option file may hold, as data: every key of ours and of BasicSR's, its values, and its default.

The check before a run, ``docs/options.md`` and ``options/schema.json`` all come from here. What is handed to a
constructor (networks, losses, optimizers, schedulers, metrics) stands in that constructor's signature instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lora_sr.adapters.config import ALSO_TRAIN

LARGEST_NUMBER = 3e38
LONGEST_NAME, LONGEST_RUN = 255, 200  # bytes, of one file or folder, and of one that has a run's name
LARGEST_SEED = 2**32 - 1 - 1024  # numpy's, less one for each process
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Args:
        text: What completes the sentence "The value has to be …".
        holds: Whether a value is of this kind.
        json: The same as a JSON Schema.
        choices: The only values, where they can be counted.
    """

    text: str
    holds: Callable[[Any], bool]
    json: dict
    choices: tuple = ()

    def fault(self, where: str, value: Any) -> str:
        """The sentence for a value that is not of this kind; empty for one that is."""
        if self.holds(value):
            return ''
        if self.choices:
            return f"{where}: there is no '{value}'; it is one of {self.text}"
        shown = list(value) if isinstance(value, (list, tuple)) else dict(value) if isinstance(value, dict) else value
        return f'{where} has to be {self.text}, not {shown!r}'


@dataclass(frozen=True)
class Key:
    """A key of a section.

    A condition is a choice of facts, with a space between them, of which one has to hold; ``a&b`` are two that have to
    hold together. Facts are ``train`` and ``test``, the names of the run's model and of the section's dataset, and
    those of :data:`FACTS`.

    Args:
        kind: What its value may be.
        help: What it is for, in a line.
        default: What BasicSR takes where it is left out.
        needed: The condition under which it has to be there.
        only: The condition under which it is read at all; by default it always is.
    """

    kind: Kind
    help: str
    default: Any = None
    needed: str = ''
    only: str = ''

    def is_known(self, facts: set[str]) -> bool:
        """Whether somebody reads it where these facts hold."""
        return not self.only or _is_met(self.only, facts)

    def is_needed(self, facts: set[str]) -> bool:
        """Whether it has to be there where these facts hold."""
        return self.is_known(facts) and _is_met(self.needed, facts)


def _is_met(condition: str, facts: set[str]) -> bool:
    return any(facts.issuperset(choice.split('&')) for choice in condition.split())


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds. True, False, NaN and infinity are none here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def number(least: float | None = 0, most: float | None = None, below: float | None = None) -> Kind:
    """A number of a range, ``below`` excluded."""

    def holds(value: Any) -> bool:
        good = is_number(value) and (least is None or value >= least)
        return good and (most is None or value <= most) and (below is None or value < below)

    limits = {'minimum': least, 'maximum': most, 'exclusiveMaximum': below}
    text = 'a number' if least is None else f'a number of at least {least}'
    text = text if most is None else f'a number from {least} to {most}'
    text = text if below is None else f'{text} and less than {below}'
    return Kind(text, holds, {'type': 'number', **{key: value for key, value in limits.items() if value is not None}})


def positive() -> Kind:
    """A number more than 0."""
    holds = lambda value: is_number(value) and value > 0  # noqa: E731
    return Kind('a number more than 0', holds, {'type': 'number', 'exclusiveMinimum': 0})


def whole(least: int, most: int | None = None) -> Kind:
    """A whole number of a range; 1e5 is one, too."""

    def holds(value: Any) -> bool:
        good = is_number(value) and value >= least and value == int(value)
        return good and (most is None or value <= most)

    limits = {'minimum': least} if most is None else {'minimum': least, 'maximum': most}
    text = f'a whole number of at least {least}' if most is None else f'a whole number from {least} to {most}'
    return Kind(text, holds, {'type': 'integer', **limits})


def one_of(*choices: Any) -> Kind:
    """One of some values."""
    text = ', '.join('~' if choice is None else str(choice) for choice in choices)
    return Kind(text, lambda value: value in choices, {'enum': list(choices)}, choices)


def optional(kind: Kind) -> Kind:
    """A value of that kind, or ~."""
    json = {'anyOf': [kind.json, {'type': 'null'}]}
    return Kind(f'{kind.text} or ~', lambda value: value is None or kind.holds(value), json)


def pair(least: float, differ: bool = False) -> Kind:
    """The two ends of a range."""

    def holds(value: Any) -> bool:
        good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))
        return good and least <= value[0] <= value[1] and not (differ and value[0] == value[1])

    items = {'type': 'number', 'minimum': least}
    more = 'more than' if differ else 'at least'
    text = f'two numbers from {least}, the second {more} the first'
    return Kind(text, holds, {'type': 'array', 'items': items, 'minItems': 2, 'maxItems': 2})


def weights(count: int, which: str) -> Kind:
    """As many weights, of which one at least counts."""

    def holds(value: Any) -> bool:
        good = isinstance(value, (list, tuple)) and len(value) == count and all(map(is_number, value))
        return good and min(value) >= 0 and sum(value) > 0

    items = {'type': 'number', 'minimum': 0}
    text = f'{count} weights ({which}) of at least 0 that are not all 0'
    return Kind(text, holds, {'type': 'array', 'items': items, 'minItems': count, 'maxItems': count})


def list_of(text: str, item: Kind) -> Kind:
    """A list that is not empty."""
    return Kind(
        f'a list of {text}',
        lambda value: isinstance(value, (list, tuple)) and bool(value) and all(map(item.holds, value)),
        {'type': 'array', 'items': item.json, 'minItems': 1},
    )


def _is_path(value: Any) -> bool:
    """Whether a value is what a file system may hold: without NUL, and of names of at most 255 bytes."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    parts = os.fsencode(value).split(b'/')
    return b'\0' not in b''.join(parts) and max(map(len, parts)) <= LONGEST_NAME


def _is_below(value: Any) -> bool:
    """Whether a value names something below a folder: nothing that leads out of it, nor the folder itself."""
    parts = value.split(os.sep) if isinstance(value, str) else ['']
    return _is_path(value) and value.isprintable() and not {'', '.', '..'} & set(parts)


def _is_roots(value: Any) -> bool:
    roots = value if isinstance(value, (list, tuple)) else [value]
    return bool(roots) and all(isinstance(root, str) and _is_path(root) for root in roots)


def _is_backend(value: Any) -> bool:
    return isinstance(value, dict) and value.get('type') in ('disk', 'lmdb', 'memcached')


FLAG = Kind('true or false', lambda value: isinstance(value, bool), {'type': 'boolean'})
TEXT = Kind('a text', lambda value: isinstance(value, str), {'type': 'string'})
LABEL = Kind(
    'a text or a number', lambda value: isinstance(value, str) or is_number(value), {'type': ['string', 'number']}
)
BORDER = replace(
    whole(0, 1024), holds=lambda value: isinstance(value, int) and whole(0, 1024).holds(value)
)  # it cuts arrays, which floats do not
PATH = Kind('a path', lambda value: _is_path(value), {'type': 'string'})
PROBABILITY = number(0, 1)
RANGE = pair(0)
# What has keys of its own is checked where these are.
SECTION = Kind('a section', lambda value: True, {'type': 'object'})
NAMED = Kind('a name', lambda value: True, {'type': 'string'})
FOLDER = Kind(
    'the name of a folder',
    # BasicSR puts a date behind it, for the name of a log.
    lambda value: _is_below(value) and os.sep not in value and len(os.fsencode(value)) <= LONGEST_RUN,
    {'type': 'string', 'minLength': 1, 'maxLength': LONGEST_RUN, 'pattern': r'^(?!\.{1,2}$)[^/\x00-\x1f]+$'},
)
BELOW = Kind('a name, of a folder as well', lambda value: _is_below(value), {'type': 'string', 'minLength': 1})
GPUS = replace(
    whole(0),
    holds=lambda value: value == 'auto' or whole(0).holds(value),
    json={'anyOf': [{'const': 'auto'}, whole(0).json]},
)
PARAM_KEY = replace(optional(TEXT), text='a key, keys joined by dots, or ~')
ROOTS = Kind(
    'a folder or a database, or a list of them',
    _is_roots,
    {'anyOf': [{'type': 'string'}, {'type': 'array', 'items': {'type': 'string'}, 'minItems': 1}]},
)
LISTS_OF_NAMES = Kind(
    'a path, or a list of them',
    lambda value: all(map(optional(PATH).holds, value)) if isinstance(value, list) and value else PATH.holds(value),
    {'anyOf': [PATH.json, {'type': 'array', 'items': optional(PATH).json, 'minItems': 1}]},
)
BACKEND = Kind(
    '{type: disk} or {type: lmdb}',
    _is_backend,
    {'type': 'object', 'properties': {'type': {'enum': ['disk', 'lmdb', 'memcached']}}, 'required': ['type']},
)
COMPILE = Kind(
    'true, false, or a section of arguments of torch.compile',
    lambda value: isinstance(value, (bool, dict)),
    {'type': ['boolean', 'object']},
)
BLURS = 'iso aniso generalized_iso generalized_aniso plateau_iso plateau_aniso'.split()
SECTION_OR_NONE = replace(SECTION, text='a section or ~', json={'type': ['object', 'null']})

# What a condition may name beside the phase and the names of classes, in words.
FACTS = {
    'degrading': 'where LR images are made on the fly',
    'saving': 'with `save_img: true`',
    'folder': 'with `io_backend: {type: disk}`',
}

# BasicSR's models and ours, by what they read. Those that are not here are of others: their keys are not known.
PLAIN = 'SRModel SwinIRModel RealESRNetModel'
GAN = 'SRGANModel ESRGANModel RealESRGANModel'
DEGRADING = 'RealESRNetModel RealESRGANModel'
DISTILLATION = 'DistillationModel'
VIDEO = 'VideoBaseModel EDVRModel VideoRecurrentModel'
VIDEO_GAN = 'VideoGANModel VideoRecurrentGANModel'
FACE, STYLE = 'HiFaceGANModel', 'StyleGAN2Model'
MODELS = f'{PLAIN} {GAN} {DISTILLATION} {VIDEO} {VIDEO_GAN} {FACE} {STYLE}'
_PIXELS = f'{PLAIN} {GAN} {VIDEO} {VIDEO_GAN} {FACE}'
_DISCRIMINATOR = f'{GAN} {VIDEO_GAN} {FACE}'
_RECURRENT = 'VideoRecurrentModel VideoRecurrentGANModel'

# Datasets, likewise.
PAIRED, LR_ONLY, DEGRADED = 'PairedImageDataset', 'LRImageDataset', 'RealESRGANDataset'
LISTED = 'RealESRGANPairedDataset'
# What reads raw databases, and with what else it shares its keys.
RAW_PAIRED, RAW_LR = 'RawPairedImageDataset', 'RawLRImageDataset'
PAIRS, LR_ALONE = f'{PAIRED} {RAW_PAIRED}', f'{LR_ONLY} {RAW_LR}'
REDS, VIMEO = 'REDSDataset REDSRecurrentDataset', 'Vimeo90KDataset Vimeo90KRecurrentDataset'
VIDEO_TEST = 'VideoTestDataset VideoTestVimeo90KDataset VideoTestDUFDataset VideoRecurrentTestDataset'
SINGLE, FACES = 'SingleImageDataset', 'FFHQDataset'
IMAGES = (*PAIRS.split(), *LR_ALONE.split(), DEGRADED, LISTED, SINGLE, FACES)
DATASETS = f'{PAIRS} {LR_ALONE} {DEGRADED} {LISTED} {SINGLE} {FACES} {REDS} {VIMEO} {VIDEO_TEST}'


def with_article(dataset: str) -> str:
    """The name of a dataset in a sentence."""
    return f'an {dataset}' if dataset.startswith('LR') else f'a {dataset}'


def paired_with(dataset: str) -> str:
    """The dataset of pairs that is stored as one of LR images alone."""
    return RAW_PAIRED if dataset == RAW_LR else PAIRED


def _all(condition: str, fact: str) -> str:
    """The condition under which that fact holds, too."""
    return ' '.join(f'{choice}&{fact}' for choice in condition.split())


def _degradation(end: str, which: str) -> dict[str, Key]:
    def key(kind: Kind, help: str) -> Key:
        return Key(kind, f'{help}, in the {which} degradation.', needed='degrading', only=DEGRADING)

    return {
        f'resize_prob{end}': key(weights(3, 'up, down, as it is'), 'How often LR images are resized up, down, and not'),
        f'resize_range{end}': key(RANGE, 'The factors by which they are resized'),
        f'gaussian_noise_prob{end}': key(PROBABILITY, 'How often the noise is Gaussian, rather than Poisson noise'),
        f'noise_range{end}': key(RANGE, 'The standard deviations of Gaussian noise, of 255'),
        f'poisson_scale_range{end}': key(RANGE, 'The scales of Poisson noise'),
        f'gray_noise_prob{end}': key(PROBABILITY, 'How often noise is the same in all channels'),
        f'jpeg_range{end}': key(pair(1), 'The qualities of JPEG'),
    }


def _blur(end: str, which: str) -> dict[str, Key]:
    def key(kind: Kind, help: str) -> Key:
        return Key(kind, f'{help}, in the {which} degradation.', needed=DEGRADED, only=DEGRADED)

    return {
        f'blur_kernel_size{end}': key(whole(1), 'The largest side of a blur kernel'),
        f'kernel_list{end}': key(list_of(', '.join(BLURS), one_of(*BLURS)), 'The kinds of blur kernels'),
        f'kernel_prob{end}': key(list_of('weights', number(None)), 'How often each of them is drawn'),
        f'sinc_prob{end}': key(PROBABILITY, 'How often a sinc filter is drawn instead'),
        f'blur_sigma{end}': key(pair(0, differ=True), 'The standard deviations of the blur'),
        f'betag_range{end}': key(RANGE, 'The shapes of generalized Gaussian kernels'),
        f'betap_range{end}': key(RANGE, 'The shapes of plateau kernels'),
    }


def of_network(letter: str, which: str) -> dict[str, Key]:
    """The keys of ``path`` that belong to ``network_LETTER``."""
    return {
        f'pretrain_network_{letter}': Key(optional(PATH), f'The checkpoint that {which} starts from.'),
        f'param_key_{letter}': Key(
            PARAM_KEY,
            'The entry of that file with the weights.'
            + (' By default wherever they are, the average first.' if letter == 't' else ''),
            default=None if letter == 't' else 'params',
        ),
        f'strict_load_{letter}': Key(FLAG, 'Whether all keys and shapes have to fit.', default=True),
    }


_SHARPENED = 'compares with a sharpened GT image.'
TOP = {
    'name': Key(FOLDER, 'The name of the run, and of its folder in `experiments/` or `results/`.', needed='train test'),
    'model_type': Key(NAMED, 'The model, i.e. the kind of training: one of the registry.', needed='train test'),
    'scale': Key(whole(1), 'By how much GT images are larger than LR images.'),
    'num_gpu': Key(GPUS, 'GPUs of a process: `auto` for all that are there, 0 for the CPU.', needed='train test'),
    'manual_seed': Key(optional(whole(0, LARGEST_SEED)), 'The seed of everything random; by default it is drawn.'),
    'imports': Key(
        list_of('modules or .py files', TEXT),
        'Modules or .py files that are imported first: networks, losses, metrics … of your own.',
    ),
    'datasets': Key(
        SECTION, 'The datasets: `train`, and `val`, `val_2`, …; or `test`, `test_2`, ….', needed='train test'
    ),
    'network_g': Key(SECTION, 'The network; the student of a distillation.', needed='train test'),
    'network_d': Key(SECTION, 'The discriminator.', needed=_all(f'{_DISCRIMINATOR} {STYLE}', 'train')),
    'network_t': Key(SECTION, 'The teacher, of a DistillationModel alone. No test needs it.'),
    'path': Key(SECTION, 'Checkpoints to start from.', needed='train test'),
    'train': Key(SECTION, 'Optimizers, schedule and losses.', needed='train'),
    'val': Key(SECTION_OR_NONE, 'What is measured, and how often.', needed='test'),
    'logger': Key(SECTION, 'How often is logged and saved.', needed='train'),
    'dist_params': Key(SECTION, 'How several processes talk to each other.'),
    'find_unused_parameters': Key(
        FLAG, 'Whether several processes allow for parameters that get no gradient.', default=False
    ),
    'high_order_degradation': Key(
        FLAG, 'Whether the model makes its LR images itself; false for pairs.', default=True, only=DEGRADING
    ),
    'gt_usm': Key(FLAG, f'Whether the training {_SHARPENED}', needed='RealESRNetModel&degrading', only=DEGRADING),
    **{
        f'{name}_gt_usm': Key(
            FLAG, f'Whether the {loss} {_SHARPENED}', needed='RealESRGANModel&train', only=DEGRADING
        )
        for name, loss in (('l1', 'pixel loss'), ('percep', 'perceptual loss'), ('gan', 'discriminator'))
    },
    **_degradation('', 'first'),
    'second_blur_prob': Key(PROBABILITY, 'How often there is a second blur.', needed='degrading', only=DEGRADING),
    **_degradation('2', 'second'),
    'gt_size': Key(whole(1), 'Side of the square GT patches.', needed='degrading', only=DEGRADING),
    'queue_size': Key(
        whole(1), 'Pairs that wait in a pool, so that a batch mixes degradations.', default=180,
        only=DEGRADING,
    ),
}  # fmt: skip

PATHS = {
    **of_network('g', 'the network'),
    **of_network('d', 'the discriminator'),
    **of_network('t', 'the teacher'),
    'resume_state': Key(optional(PATH), 'The state of a run to go on with; or `--auto_resume` on the command line.'),
    'ignore_resume_networks': Key(
        optional(list_of('names such as network_d', TEXT)), 'Networks that do not start from the run that goes on.'
    ),
    'experiments_root': Key(optional(PATH), "The folder of trainings, in BasicSR's master branch."),
    'results_root': Key(optional(PATH), "The folder of tests, in BasicSR's master branch."),
}

TRAIN = {
    'pixel_opt': Key(
        SECTION_OR_NONE, "The loss of the network's output against the GT image.", only=f'{_PIXELS} {DISTILLATION}'
    ),
    'perceptual_opt': Key(SECTION_OR_NONE, 'The loss of features of VGG.', only=_PIXELS),
    'distill_pixel_opt': Key(
        SECTION_OR_NONE, "The loss of the student's output against the teacher's.", only=DISTILLATION
    ),
    'affinity_opt': Key(
        SECTION_OR_NONE,
        "The loss of the student's features against the teacher's; `layers` names them.",
        only=DISTILLATION,
    ),
    'gan_opt': Key(
        SECTION_OR_NONE, 'The loss of the discriminator.', needed=f'{GAN} {STYLE}', only=f'{_DISCRIMINATOR} {STYLE}'
    ),
    'ldl_opt': Key(
        SECTION_OR_NONE, 'The loss of artifacts, against the average of the weights.', only=f'{GAN} VideoGANModel'
    ),
    'feature_matching_opt': Key(SECTION_OR_NONE, "The loss of the discriminator's features.", only=FACE),
    'ema_decay': Key(
        number(0, below=1),
        'The decay of the average of the weights, which is validated and saved as params_ema; 0 for none.',
        default=0,
        only=f'{_PIXELS} {DISTILLATION}',
    ),
    'optim_g': Key(SECTION, "The network's optimizer.", needed='train'),
    'optim_d': Key(
        SECTION,
        "The discriminator's optimizer.",
        needed=f'{_DISCRIMINATOR} {STYLE}',
        only=f'{_DISCRIMINATOR} {STYLE}',
    ),
    'scheduler': Key(SECTION, 'The schedule of the learning rates.', needed='train'),
    'total_iter': Key(whole(1), 'How many iterations the training has.', needed='train'),
    'max_minutes': Key(
        optional(number(0.1)),
        'The run saves its state and ends when it has taken so long; `--auto_resume` goes on, for as long again.',
    ),
    'warmup_iter': Key(whole(-1), 'Iterations in which the learning rate rises to its value; -1 for none.', default=-1),
    'net_d_iters': Key(whole(1), 'The network learns in each such iteration alone.', default=1, only=_DISCRIMINATOR),
    'net_d_init_iters': Key(
        whole(0), 'Iterations in which the discriminator learns alone first.', default=0, only=_DISCRIMINATOR
    ),
    'amp': Key(
        one_of('bf16', 'fp16', None),
        'Automatic mixed precision of the networks: bfloat16, or float16 with scaled losses; ~ for float32.',
    ),
    'memory_format': Key(
        one_of('contiguous', 'channels_last', None),
        'The memory layout of the networks; channels_last is faster for most.',
        default='contiguous',
    ),
    'compile': Key(
        COMPILE, 'Whether the blocks of the networks are compiled; or arguments of `torch.compile`.', default=False
    ),
    'accumulate_iter': Key(
        whole(1), 'Batches of which one iteration takes the mean gradient, one after the other.', default=1
    ),
    'clip_grad_norm': Key(
        optional(positive()), "The largest norm of the gradients of an optimizer's parameters; ~ for any."
    ),
    'checkpointing': Key(
        FLAG,
        'Whether the blocks of the networks compute their activations anew in the backward pass, and keep none.',
        default=False,
    ),
    'tf32': Key(optional(FLAG), "Whether products in float32 may use TF32 on a GPU; ~ for torch's own choice."),
    'graph': Key(
        FLAG,
        'Whether the whole iteration is one CUDA graph: of one process, without `checkpointing`. What cannot be '
        'recorded runs without, and the log says why.',
        default=False,
    ),
    'tsa_iter': Key(optional(whole(1)), 'Iterations in which the fusion module trains alone first.', only='EDVRModel'),
    'dcn_lr_mul': Key(number(), 'By how much the deformable layers learn faster.', default=1, only='EDVRModel'),
    'flow_lr_mul': Key(number(), 'By how much the optical flow learns faster.', default=1, only=_RECURRENT),
    'lr_flow': Key(number(), 'The learning rate of the optical flow.', only='VideoRecurrentGANModel'),
    'fix_flow': Key(optional(whole(0)), 'Iterations in which the optical flow stays as it is.', only=_RECURRENT),
    **{
        key: Key(kind, help, needed=STYLE, only=STYLE)
        for key, kind, help in (
            ('mixing_prob', PROBABILITY, 'How often styles are mixed.'),
            ('net_g_reg_every', whole(1), 'The generator is regularized in each such iteration.'),
            ('net_d_reg_every', whole(1), 'The discriminator is regularized in each such iteration.'),
            ('path_reg_weight', number(), 'The weight of the regularization of path lengths.'),
            ('path_batch_shrink', whole(1), 'By how much the batch of that regularization is smaller.'),
            ('r1_reg_weight', number(), 'The weight of the R1 regularization.'),
        )
    },
}

VAL = {
    'val_freq': Key(whole(1), 'Iterations between two validations.', needed='train'),
    'save_img': Key(FLAG, 'Whether the images are saved.', needed='train test'),
    'suffix': Key(
        optional(LABEL), "What is added to the images' names; ~ for the name of the run.", needed='test&saving'
    ),
    'metrics': Key(SECTION_OR_NONE, 'The metrics, a section each, under names of your own.'),
    'pbar': Key(FLAG, 'Whether a progress bar is shown.', default=False),
    'tile': Key(
        optional(whole(1)),
        'Side of the tiles in LR pixels in which images are run, larger where the network needs it; by default whole.',
        only=f'{PLAIN} {GAN} {DISTILLATION}',
    ),
    'center_frame_only': Key(FLAG, 'Whether the middle frame alone counts.', default=False, only=_RECURRENT),
    'flip_seq': Key(FLAG, 'Whether the frames run backwards, too.', default=False, only=_RECURRENT),
    'num_val_samples': Key(whole(1), 'How many images are made.', default=16, only=STYLE),
}

LOGGER = {
    'print_freq': Key(whole(1), 'Iterations between two lines of the log.', needed='train'),
    'save_checkpoint_freq': Key(whole(1), 'Iterations between two checkpoints.', needed='train'),
    'keep_last': Key(
        optional(whole(1)),
        'How many checkpoints stay, with their states, besides those that are the best of a metric; by default all.',
    ),
    'keep_best': Key(
        optional(TEXT),
        'A name in `val.metrics`: the best network by it, of each validation set, is kept as `net_g_best_SET.pth`.',
    ),
    'use_tb_logger': Key(FLAG, 'Whether TensorBoard gets the values, too.', needed='train'),
    'save_images_to_tb': Key(FLAG, 'Whether it gets the images of validations, too.', default=False),
    'wandb': Key(SECTION_OR_NONE, 'Weights & Biases; it needs `use_tb_logger: true`.'),
}

WANDB = {
    'project': Key(optional(TEXT), 'The project; ~ for none, and no logging there.'),
    'resume_id': Key(optional(TEXT), 'The id of a run that goes on; by default that of the run that is resumed.'),
}

DIST_PARAMS = {
    'backend': Key(one_of('nccl', 'gloo', 'mpi'), 'NCCL for GPUs, Gloo for CPUs.', default='nccl'),
    'port': Key(whole(1), 'The port of the first process; under slurm alone.', default=29500),
}

BACKENDS = {
    'type': Key(NAMED, '`disk` for folders of images, `lmdb` for databases, `memcached`.', needed='train test'),
    **{
        key: Key(Kind('anything', lambda value: True, {}), help, only='memcached')
        for key, help in (
            ('server_list_cfg', 'The list of servers.'),
            ('client_cfg', 'The configuration of the client.'),
            ('sys_path', 'Where the module is.'),
        )
    },
}

_GT = f'{PAIRS} {DEGRADED} {LISTED} {FACES} {REDS} {VIMEO} {VIDEO_TEST}'
_LR = f'{PAIRS} {LR_ALONE} {LISTED} {SINGLE} {REDS} {VIMEO} {VIDEO_TEST}'
_PATCHES = f'{PAIRS} {LISTED} {REDS} {VIMEO}'
_PAIRS_TRAIN = _all(PAIRS, 'train')
DATASET = {
    'name': Key(BELOW, 'What it is called in the log and in `results/`.', needed='train test'),
    'type': Key(NAMED, 'The dataset: one of the registry.', needed='train test'),
    'dataroot_gt': Key(
        ROOTS,
        'The folder or database of GT images; of a PairedImageDataset also a list. Raw databases, of `lora-sr prepare '
        '--raw`, are for the types that begin with Raw, and for RealESRGANDataset.',
        needed=f'{PAIRS} {DEGRADED}', only=_GT,
    ),
    'dataroot_lq': Key(
        ROOTS,
        'The folder or database of LR images; of a PairedImageDataset or LRImageDataset also a list. Roots pair by '
        'their places in the lists, and one that stands there several times is drawn as many times as often.',
        needed=f'{PAIRS} {LR_ALONE}', only=_LR,
    ),
    'dataroot_flow': Key(optional(PATH), 'The folder or database of optical flow.', only=REDS),
    'meta_info_file': Key(
        optional(LISTS_OF_NAMES),
        'A text file that names an image in each line; by default all are taken. Of several roots it is for all, and a '
        'list of files has one, or ~, for each.',
        only=f'{PAIRS} {SINGLE} {REDS} {VIMEO} {VIDEO_TEST}',
    ),
    'meta_info': Key(
        optional(PATH), 'A text file that names an image below `dataroot_gt` in each line.',
        needed=f'{DEGRADED}&folder', only=f'{DEGRADED} {LISTED}',
    ),
    'io_backend': Key(BACKEND, 'How the images are stored.', needed=f'{PAIRS} {LR_ALONE} {DEGRADED}'),
    'filename_tmpl': Key(TEXT, "An LR image's name, {} for its GT image's.", default='{}', only=f'{PAIRS} {LISTED}'),
    'gt_size': Key(whole(1), 'Side of the square GT patches.', needed=_PAIRS_TRAIN, only=_PATCHES),
    'lq_size': Key(whole(1), 'Side of the square LR patches.', needed=LR_ALONE, only=LR_ALONE),
    'use_hflip': Key(
        FLAG, 'Whether patches are flipped at random.', needed=f'{_PAIRS_TRAIN} {LR_ALONE} {DEGRADED}',
        only=f'{_PATCHES} {LR_ALONE} {DEGRADED} {FACES}',
    ),
    'use_rot': Key(
        FLAG, 'Whether patches are rotated by 90 degrees at random.', needed=f'{_PAIRS_TRAIN} {LR_ALONE} {DEGRADED}',
        only=f'{_PATCHES} {LR_ALONE} {DEGRADED}',
    ),
    'use_rgb_permutation': Key(
        FLAG, 'Whether patches have their channels in a random order.', default=False,
        only=f'{RAW_PAIRED} {RAW_LR}',
    ),
    'blend_prob': Key(
        PROBABILITY, 'How often a patch is mixed with a random color, which takes contrast away.', default=0,
        only=f'{RAW_PAIRED} {RAW_LR}',
    ),
    'blend_alpha': Key(
        PROBABILITY, 'The least share that a patch keeps in a mix with a color.', default=0.6,
        only=f'{RAW_PAIRED} {RAW_LR}',
    ),
    'batch_size_per_gpu': Key(whole(1), 'Patches of a batch, of each GPU of a process.', needed='train'),
    'num_worker_per_gpu': Key(
        whole(0, MOST_WORKERS), 'Processes that read images, for each GPU of a process.', needed='train'
    ),
    'dataset_enlarge_ratio': Key(number(1), 'By how much epochs get longer: new workers cost time.', default=1),
    'prefetch_mode': Key(one_of('cpu', 'cuda', None), 'Where batches wait.'),
    'num_prefetch_queue': Key(whole(1), 'How many batches wait, with `prefetch_mode: cpu`.', default=1),
    'pin_memory': Key(FLAG, 'Whether batches wait in pinned memory; `prefetch_mode: cuda` needs it.', default=False),
    'persistent_workers': Key(FLAG, 'Whether workers live longer than an epoch.', default=False),
    'mean': Key(
        optional(list_of('numbers', number(None))), 'What is subtracted from each channel.', needed=FACES,
        only=f'{PAIRS} {LISTED} {SINGLE} {FACES}',
    ),
    'std': Key(
        optional(list_of('numbers', number(None))), 'What each channel is divided by.', needed=FACES,
        only=f'{PAIRS} {LISTED} {SINGLE} {FACES}',
    ),
    'color': Key(one_of('y', 'rgb', None), '`y` for the Y channel alone.', only=f'{PAIRS} {SINGLE}'),
    **_blur('', 'first'),
    **_blur('2', 'second'),
    'final_sinc_prob': Key(PROBABILITY, 'How often a sinc filter comes last.', needed=DEGRADED, only=DEGRADED),
    'num_frame': Key(whole(-1), 'Frames of a sequence.', only=f'{REDS} {VIMEO} {VIDEO_TEST}'),
    'interval_list': Key(list_of('whole numbers', whole(1)), 'Distances of frames, of which one is drawn.', only=REDS),
    'random_reverse': Key(FLAG, 'Whether sequences run backwards at random.', only=f'{REDS} {VIMEO}'),
    'val_partition': Key(one_of('REDS4', 'official'), 'Which clips are left for validation.', needed=REDS, only=REDS),
    'test_mode': Key(FLAG, 'Whether it is for a test.', only='REDSRecurrentDataset'),
    'flip_sequence': Key(FLAG, 'Whether the sequence runs backwards, too.', only=VIMEO),
    'cache_data': Key(FLAG, 'Whether all images stay in memory.', only=VIDEO_TEST),
    'padding': Key(TEXT, "How frames beyond a clip's ends are made.", only=VIDEO_TEST),
    'use_duf_downsampling': Key(FLAG, 'Whether LR frames are made as for DUF.', only='VideoTestDUFDataset'),
}  # fmt: skip

# The section `lora` of an AdaptSR; LoRAConfig checks it.
_PATTERNS = list_of('regular expressions', TEXT)
LORA = {
    'groups': Key(
        list_of('groups', one_of('conv', 'attention', 'mlp', 'upsampler', 'all')),
        'Groups of layers that receive LoRA: conv, attention, mlp, upsampler, or all.',
    ),
    'target_modules': Key(_PATTERNS, 'Patterns of the names of further layers that receive it.'),
    'target_parameters': Key(_PATTERNS, 'Patterns of the names of parameters that get a delta.'),
    'exclude_modules': Key(_PATTERNS, 'Patterns of layers that stay as they are.'),
    'rank': Key(whole(1), 'Rank of the updates.', default=8),
    'alpha': Key(optional(number(None)), 'The updates count alpha / rank times; by default it is the rank.'),
    'rank_pattern': Key(SECTION, 'Patterns of layers of another rank, and that rank; 0 leaves them as they are.'),
    'alpha_pattern': Key(SECTION, 'Patterns of layers of another alpha, and that alpha.'),
    'also_train': Key(
        list_of('words', one_of(*ALSO_TRAIN)),
        f'What trains besides, as a delta: {", ".join(ALSO_TRAIN)}.',
    ),
}

# In ``network_t``, beside the type and its arguments.
TEACHER = {
    'precompute': Key(
        FLAG,
        "Whether the teacher's outputs are made once, for whole images, and stored beside them; it needs a dataset of "
        'raw images.',
        default=False,
        only=DISTILLATION,
    ),
    'self_ensemble': Key(
        FLAG,
        'Whether they are the mean over the eight flips and rotations of an image; it needs `precompute: true`.',
        default=False,
        only=DISTILLATION,
    ),
}

# Sections of a file by their names there; `*` stands for any.
SECTIONS = {
    '': TOP,
    'datasets.*': DATASET,
    'datasets.*.io_backend': BACKENDS,
    'path': PATHS,
    'train': TRAIN,
    'val': VAL,
    'logger': LOGGER,
    'logger.wandb': WANDB,
    'dist_params': DIST_PARAMS,
    'network_g.lora': LORA,
    'network_t': TEACHER,
}
