"""Going on with a run whose option file has changed since: what changes is applied, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_sr import threads
from lora_sr.adapters import LoRAConfig
from lora_sr.archs.registry import find_arch
from lora_sr.basicsr import provenance
from lora_sr.basicsr.patches.optimizers import find_optimizer
from lora_sr.basicsr.samples import recorded_of, stream_of
from lora_sr.checkpoints.origin import KEY, Origin
from lora_sr.errors import InputError, shown

LOG = logging.getLogger('basicsr')

# What of a network can only be what it was: the tensors of its LoRA, and the alphas that are saved with them.
LORA_KEYS = ('type', 'lora', 'rank', 'alpha', 'rank_pattern', 'alpha_pattern')
# What optimizers of torch and Adan keep of each weight, in its shape.
MOMENTS = (
    *('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_avg_diff', 'exp_inf', 'momentum_buffer'),
    *('square_avg', 'grad_avg', 'acc_delta', 'sum'),
)
# What an optimizer has for its device, and for train.graph: a run may go on with others.
OF_MACHINE = ('foreach', 'fused', 'capturable')
# Of a scheduler: what it counts beside what begins with an underscore, and what follows from other options.
COUNTED = ('last_epoch', 'verbose')
DERIVED = ('base_lrs', 'cumulative_period')


def last_saved(training_states: str | os.PathLike[str], before: str | None = None) -> int | None:
    """The iteration from which ``--auto_resume`` goes on; ``None`` where nothing is saved in that folder.

    Args:
        training_states: The folder.
        before: An iteration, as the name of its state has it: only earlier ones count.
    """
    names = (file.stem for file in Path(training_states).glob('*.state'))
    iterations = (int(name) for name in names if re.fullmatch('[0-9]+', name))
    return max((one for one in iterations if before is None or one < int(before)), default=None)


def record(model: Any, epoch: int, iteration: int) -> dict[str, Any]:
    """What a training state says beside BasicSR's own keys, to go on as if the run had not stopped.

    ``pool``: the training pairs from which Real-ESRGAN's models draw; of one process, for each has its own.
    ``samples``: see :meth:`lora_sr.basicsr.samples.SampleStream.record`. ``best``: the best value of each metric.
    ``threads``: how many compute, upon which sums depend. ``scaler``: the scale of the losses, with ``train.amp``
    ``fp16``. ``optimizer_types``: by section. ``trained``: the names of the tensors that each optimizer trains, by its
    number.
    """
    stream = stream_of(model.opt)
    names = _names(model)
    return {
        **({} if stream is None else {'samples': stream.record(epoch, iteration)}),
        'best': _best(model),
        'best_of': {dataset: meanings(model.opt, dataset) for dataset in _best(model)},
        **({'pool': _pool(model)} if hasattr(model, 'queue_lr') and not model.opt['dist'] else {}),
        'threads': {'count': torch.get_num_threads()},
        'optimizer_types': _optimizer_types(provenance.given('train')),
        **({} if scaler_of(model) is None else {'scaler': scaler_of(model).state_dict()}),
        'trained': {
            str(number): [names.get(id(one), '') for one in _tensors(optimizer)]
            for number, optimizer in enumerate(model.optimizers)
        },
    }


def check_state(state: Mapping[str, Any], path: object) -> None:
    """Check that what a training state counts, and the states in it, are what they are called.

    Raises:
        InputError: The file is damaged.
    """

    def check(name: str, value: Any, kind: type, words: str) -> None:
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise InputError(f'{path} is damaged: its {name} must be {words}, got {shown(repr(value), 40)}.')

    for key in ('epoch', 'iter'):
        check(key, state[key], int, 'a whole number')
    for key in ('optimizers', 'schedulers'):
        check(key, state[key], list, 'a list')
        for number, part in enumerate(state[key]):
            check(f'{key}[{number}]', part, Mapping, 'a section')
    for number, optimizer in enumerate(state['optimizers']):
        name = f'optimizers[{number}]'
        check(f'{name}.state', optimizer.get('state'), Mapping, 'a section')
        check(f'{name}.param_groups', optimizer.get('param_groups'), list, 'a list')
        for group in optimizer['param_groups']:
            check(f'{name}.param_groups', group, Mapping, 'a list of sections')
            check(f'{name}.param_groups.params', group.get('params'), list, 'a list')


def check_options(opt: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse options with which the run of a training state cannot go on.

    Raises:
        InputError: Another optimizer, network or LoRA.
    """
    file = f'{opt["path"]["models"]}/net_g_{state["iter"]}.pth'
    now = _optimizer_types(opt.get('train'))
    for key, kind in recorded_of(state, 'optimizer_types', str).items():
        if not _is_same_optimizer(now.get(key, kind), kind):
            raise InputError(
                f'train.{key}.type must be {kind} to resume this run, got {now[key]}; a new run may begin from {file}.'
            )
    origin = Origin.parse(state.get(KEY))
    if origin is None or not isinstance((origin.network or {}).get('type'), str):
        return
    assert origin.network is not None
    before, after = _lora_options(origin.network), _lora_options(opt['network_g'])
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise InputError(
                f'network_g.{key} must be {_text(before.get(key))} to resume this run, got {_text(after.get(key))}; a '
                f'new run may begin from {file}, merged.'
            )


def resume(model: Any, state: Mapping[str, Any], load: Callable[[], None]) -> None:
    """Go on with a run: load what it counted, and apply what the option file says of learning rates since.

    Args:
        model: The model of the run, as it would begin.
        state: The training state.
        load: Loads the optimizers and schedulers of the state as they are.

    Raises:
        InputError: The state is of other optimizers.
    """
    optimizers, schedulers = model.optimizers, model.schedulers
    if len(state['optimizers']) != len(optimizers):
        raise InputError(
            f'the run cannot be resumed: {type(model).__name__} has {len(optimizers)} optimizers, and its training '
            f'state {len(state["optimizers"])}.'
        )
    if len(state['schedulers']) != len(schedulers):
        raise InputError(
            f'the run cannot be resumed: {type(model).__name__} has {len(schedulers)} schedulers, and its training '
            f'state {len(state["schedulers"])}.'
        )
    for number, optimizer in enumerate(optimizers):
        _check_optimizer(model, optimizer, state, number)
    given = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    begun = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    for groups, saved in zip(given, state['optimizers']):
        for group, other in zip(groups, saved['param_groups']):
            other.update({key: group[key] for key in OF_MACHINE if key in group})
    try:
        load()
    except MemoryError:
        raise
    except Exception as error:  # torch's optimizers and schedulers, and others', raise what they like
        if isinstance(error, RuntimeError) and 'CUDA' in str(error):  # of a GPU without memory, say
            raise
        raise InputError(
            f'the run cannot be resumed: its training state is damaged ({shown(f"{type(error).__name__}: {error}")}).'
        ) from error
    _check_loaded(optimizers, schedulers, begun)
    # What else stands in a group may be counted there, as some optimizers do.
    sections = [section for key, section in model.opt['train'].items() if key.startswith('optim_') and section]
    settable = {'initial_lr', *(key for section in sections for key in section)} - {'lr', 'type'}
    changed = {}
    for optimizer, groups in zip(optimizers, given):
        for group, settings in zip(optimizer.param_groups, groups):
            own = {key: value for key, value in settings.items() if key in settable}
            changed.update(_differences(group, own))
            group.update(own)
    for scheduler, beginning, saved in zip(schedulers, begun, state['schedulers']):
        before, now = _scheduler_options(saved), _scheduler_options(beginning)
        if before.keys() != now.keys():
            changed['scheduler'] = ', '.join(before), ', '.join(now)
        else:
            changed.update(_differences(before, now))
        if before != now:
            _replay(scheduler, beginning, [group['lr'] for group in given[optimizers.index(scheduler.optimizer)]])
    for key, (before, now) in changed.items():
        if key in DERIVED:
            continue
        key = 'lr' if key == 'initial_lr' else key
        LOG.warning(f'{key} of the option file was {_text(before)} and is {_text(now)} now: applied to the whole run.')
    scale = recorded_of(state, 'scaler', (int, float))
    if scaler_of(model) is not None and scale:
        scaler_of(model).load_state_dict(scale)
    threads_before = recorded_of(state, 'threads', int).get('count', 0)
    if model.device.type == 'cpu' and threads.is_chosen() and 1 <= threads_before <= (os.cpu_count() or 1):
        torch.set_num_threads(threads_before)  # sums in other parts are others in their last bits
    model.resumed_best = _best_of_the_same(model.opt, state)
    if hasattr(model, 'queue_size') and not _take_pool(model, recorded_of(state, 'pool', (Tensor, int))):
        LOG.warning('The pool of training pairs begins empty: the run differs from one that was not interrupted.')


def scaler_of(model: Any) -> Any:
    """The scale of the losses of a model's step; ``None`` without one."""
    return getattr(getattr(model, 'training_step', None), 'scaler', None)


def moments_of(optimizer: Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """The weights of an optimizer, each with the name and the tensor of an average of its gradients, of its own shape.

    Other optimizers keep other things, such as averages of rows, of which nothing is known here.
    """
    for weight, values in optimizer.state.items():
        for name in MOMENTS if isinstance(weight, Tensor) and isinstance(values, Mapping) else ():
            if isinstance(values.get(name), Tensor):
                yield weight, name, values[name]


def _check_loaded(optimizers: list[Optimizer], schedulers: list[Any], begun: list[dict[str, Any]]) -> None:
    """Refuse what would fail in the first step: values of other shapes than their weights, words for numbers."""
    for optimizer in optimizers:
        # Those of other packages may keep averages of rows under the same names.
        has_shapes = type(optimizer).__module__.startswith(('torch.', 'lora_sr.'))
        for weight, name, value in moments_of(optimizer):
            if has_shapes and value.shape != weight.shape or not torch.isfinite(value).all():
                raise InputError(
                    f'the run cannot be resumed: its training state is damaged, as {name} of an optimizer does not fit '
                    f'a weight of shape {tuple(weight.shape)}, or is not finite.'
                )
    for scheduler, beginning in zip(schedulers, begun):
        for key, value in beginning.items():
            loaded = getattr(scheduler, key, value)
            if isinstance(value, (int, float)) and not isinstance(loaded, (int, float)):
                raise InputError(
                    f'the run cannot be resumed: its training state is damaged, as {key} of a scheduler must be a '
                    f'number, got {shown(repr(loaded), 40)}.'
                )


def _check_optimizer(model: Any, optimizer: Optimizer, state: Mapping[str, Any], number: int) -> None:
    saved = state['optimizers'][number]['param_groups']
    own = optimizer.param_groups
    if [len(group.get('betas') or ()) for group in own] != [len(group.get('betas') or ()) for group in saved]:
        options = ', '.join(key for key in saved[0] if key != 'params')
        raise InputError(
            f'the run cannot be resumed with {type(optimizer).__name__}: its optimizer had the options {options}; go '
            f'on with that one, or begin anew.'
        )
    names = _names(model)
    trained = [names.get(id(value), '') for value in _tensors(optimizer)]
    before = recorded_of(state, 'trained', list).get(str(number))
    if before is not None and before != trained or [len(g['params']) for g in own] != [len(g['params']) for g in saved]:
        differ = sorted(set(map(str, before or trained)) ^ set(trained))
        example = f' ({differ[0]}, for one)' if differ else ''
        raise InputError(
            f'the run cannot be resumed: it trained {sum(len(group["params"]) for group in saved)} tensors, and '
            f'{len(trained)} train now{example}; put that back, or begin a new run.'
        )


def _replay(scheduler: Any, beginning: dict[str, Any], rates: list[float]) -> None:
    """Bring a scheduler from its beginning to where the run is, step by step."""
    steps = scheduler.last_epoch
    scheduler.load_state_dict(copy.deepcopy(beginning))
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group['lr'] = rate
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that no optimizer has stepped
        for _ in range(steps):
            scheduler.step()


def _scheduler_options(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in state.items() if not key.startswith('_') and key not in COUNTED}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    keys = [key for key in now if key in before]
    return {key: (before[key], now[key]) for key in keys if _plain(before[key]) != _plain(now[key])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tensors(optimizer: Optimizer) -> Iterator[Any]:
    return (value for group in optimizer.param_groups for value in group['params'])


def _names(model: Any) -> dict[int, str]:
    """The names of the tensors of all networks of a model, by identity."""
    networks = {key: value for key, value in vars(model).items() if isinstance(value, nn.Module)}
    return {
        id(value): f'{key}.{name}'
        for key, network in networks.items()
        for name, value in model.get_bare_model(network).named_parameters()
    }


def _best(model: Any) -> dict[str, Any]:
    """The best metrics, also before a run that goes on has validated.

    They are plain numbers; a metric may give numpy's, which no training state can hold.
    """
    known = {**getattr(model, 'resumed_best', {}), **getattr(model, 'best_metric_results', {})}
    return {
        dataset: {name: {**best, 'val': float(best['val'])} for name, best in metrics.items()}
        for dataset, metrics in known.items()
    }


def _best_of_the_same(opt: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The best values of a training state, without those of what has another meaning now, which are named."""
    of, kept = recorded_of(state, 'best_of', Mapping), {}
    for dataset, metrics in _known_best(recorded_of(state, 'best', Mapping)).items():
        now = meanings(opt, dataset)
        before = {**now, **of.get(dataset, {})}  # of earlier versions nothing is known
        kept[dataset] = {name: best for name, best in metrics.items() if before.get(name) == now.get(name)}
        for name in (metrics.keys() & now.keys()) - kept[dataset].keys():
            LOG.warning(f'The best {name} on {dataset} begins anew: the metric or the images were others.')
    return kept


def meanings(opt: Mapping[str, Any], dataset: str) -> dict[str, str]:
    """What the values of each metric on a data set are of: another metric under its name is another matter."""
    sections = (section for section in opt.get('datasets', {}).values() if isinstance(section, Mapping))
    images = [
        {key: _basenames(value) for key, value in section.items() if key.startswith(('dataroot', 'meta_info'))}
        for section in sections
        if section.get('name') == dataset
    ]
    metrics = (opt.get('val') or {}).get('metrics') or {}
    return {name: json.dumps([section, images], sort_keys=True, default=str) for name, section in metrics.items()}


def _basenames(value: Any) -> list[str]:
    """The last names of a path, or of a list of them: data may move to another disk."""
    return [os.path.basename(str(path).rstrip('/')) for path in (value if isinstance(value, list) else [value])]


def _known_best(recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the best metrics of a training state what is one: which is better, a number, and its iteration."""

    def is_best(best: Any) -> bool:
        return isinstance(best, Mapping) and isinstance(best.get('val'), float) and isinstance(best.get('iter'), int)

    return {
        dataset: {name: dict(best) for name, best in metrics.items() if is_best(best) and 'better' in best}
        for dataset, metrics in recorded.items()
    }


def _pool(model: Any) -> dict[str, Any]:
    return {'lr': _packed(model.queue_lr), 'gt': _packed(model.queue_gt), 'filled': model.queue_ptr}


def _take_pool(model: Any, pool: Mapping[str, Any]) -> bool:
    """Give a model the pool of a training state, if it is one for these options. Returns whether it is."""
    lr, gt, filled = pool.get('lr'), pool.get('gt'), pool.get('filled')
    if not isinstance(lr, Tensor) or not isinstance(gt, Tensor) or model.opt['dist']:
        return False
    count, size = model.queue_size, model.opt['gt_size']
    if gt.shape != (count, 3, size, size) or lr.shape != (count, 3, *[size // model.opt['scale']] * 2):
        return False
    if not isinstance(filled, int) or not 0 <= filled <= count:
        return False
    model.queue_lr, model.queue_gt = (_unpacked(images).to(model.device) for images in (lr, gt))
    model.queue_ptr = filled
    return True


def _packed(images: Tensor) -> Tensor:
    """Images of 256 levels as these, in a quarter of the bytes; others as they are."""
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return (levels if torch.equal(_unpacked(levels), images) else images).cpu()


def _unpacked(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _is_same_optimizer(name: str, other: str) -> bool:
    """Whether two names are of one class: `Adam` is `torch.optim.Adam`."""
    if name == other:
        return True
    try:
        return find_optimizer(name) is find_optimizer(other)
    except InputError:  # of a package that is not here
        return False


def _optimizer_types(train: Any) -> dict[str, str]:
    sections = train.items() if isinstance(train, Mapping) else ()
    return {key: value['type'] for key, value in sections if key.startswith('optim_') and 'type' in (value or {})}


def _lora_options(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a network section says of LoRA, with the defaults of what it leaves out."""
    arch = find_arch(section['type'])
    known = inspect.signature(arch).parameters if arch is not None else {}
    options = {key: value.default for key, value in known.items() if key in LORA_KEYS}
    options.update({key: value for key, value in section.items() if key in LORA_KEYS})
    if isinstance(options.get('lora'), Mapping):
        config = dataclasses.asdict(LoRAConfig.from_dict(options.pop('lora')))
        options.update({f'lora.{key}': value for key, value in config.items()})
    return options


def _text(value: Any) -> str:
    if isinstance(value, Mapping):  # BasicSR counts milestones: {100: 1, 200: 1}
        value = sorted(value)
    return '~' if value is None else str(value)
