"""What a distillation needs: the rules that hold before a run, and for a DistillationModel that is built by itself."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from lora_sr.basicsr.options import schema
from lora_sr.errors import InputError

DATA_PARALLEL_REFUSED = (
    'train.affinity_opt does not work with several GPUs in one process: start a process for each (--launcher pytorch, '
    'see scripts/dist_train.sh), or set num_gpu: 1'
)


def option_faults(opt: dict) -> dict[str, str]:
    """What is wrong with the options of a distillation before its networks are looked at.

    Args:
        opt: The options of a training.

    Returns:
        The sentences, each under the keys that it is about, with a space between them.
    """

    def section(parent: dict, key: str) -> dict:
        return parent[key] if isinstance(parent.get(key), dict) else {}

    path, train, dataset = section(opt, 'path'), section(opt, 'train'), section(section(opt, 'datasets'), 'train')
    faults = {}
    if opt.get('network_t') is None:
        faults['network_t'] = 'network_t, the teacher of a DistillationModel, is missing'
    if path.get('pretrain_network_t') is None:
        faults['path.pretrain_network_t'] = 'path.pretrain_network_t, the trained weights of the teacher, is missing'
    kind = dataset.get('type')
    if train.get('pixel_opt') and kind in schema.LR_ALONE.split():
        faults['train.pixel_opt'] = (
            f'train.pixel_opt compares with the ground truth, which {schema.with_article(kind)} does not have: leave '
            f'it out, or train on a {schema.paired_with(kind)}'
        )
    faults.update(_precompute_faults(section(opt, 'network_t'), train, dataset))
    if not train.get('distill_pixel_opt') and not train.get('affinity_opt'):
        faults['train.distill_pixel_opt train.affinity_opt'] = (
            'train.distill_pixel_opt and train.affinity_opt are both missing; without one of them nothing is learned '
            'from the teacher'
        )
    return faults


def _precompute_faults(teacher: dict, train: dict, dataset: dict) -> dict[str, str]:
    """What is wrong with the outputs of a teacher that are made once."""
    key, kind = 'network_t.precompute', dataset.get('type')
    if teacher.get('precompute') is not True:
        if teacher.get('self_ensemble') is True:
            return {'network_t.self_ensemble': f'network_t.self_ensemble needs {key}: true'}
        return {}
    if not train.get('distill_pixel_opt'):
        return {key: f'{key} needs train.distill_pixel_opt, the loss that reads the outputs of the teacher'}
    if kind not in (schema.RAW_PAIRED, schema.RAW_LR):
        return {
            key: f'{key} needs whole images: make raw databases by lora-sr prepare --raw, and set datasets.train.type: '
            f'{schema.RAW_PAIRED}, or {schema.RAW_LR}; got {kind}'
        }
    changed = [name for name in ('mean', 'std') if dataset.get(name) is not None]
    changed += ['color'] if dataset.get('color') == 'y' else []
    if changed:
        return {key: f'{key} needs images as they are stored, without datasets.train.{changed[0]}'}
    return {}


def affinity_layers(layers: Any) -> dict[str, list[str]]:
    """The modules that ``train.affinity_opt.layers`` names, as ``{'student': [...], 'teacher': [...]}``.

    Args:
        layers: The option: one list of names for both networks, or a mapping of two such lists.

    Raises:
        InputError: It is neither, or the lists differ in length.
    """
    pair = layers if isinstance(layers, dict) else {'student': layers, 'teacher': layers}
    if set(pair) != {'student', 'teacher'} or not all(isinstance(names, list) and names for names in pair.values()):
        raise InputError(
            'train.affinity_opt.layers has to be a list of module names, or {student: [...], teacher: [...]}, '
            f'not {layers!r}'
        )
    if len(pair['student']) != len(pair['teacher']):
        raise InputError(
            f'train.affinity_opt.layers has {len(pair["student"])} layers of the student, but {len(pair["teacher"])} '
            'of the teacher; they are compared one by one'
        )
    return pair


def find_modules(network: nn.Module, layers: list[str], role: str) -> list[nn.Module]:
    """The modules of ``network`` that bear these names.

    Args:
        network: The network to look in; a teacher in the form in which it runs, i.e. folded.
        layers: Names, as ``named_modules`` gives them.
        role: What the network is, for the message: 'student' or 'teacher'.

    Raises:
        InputError: A name that the network does not have; near names are listed.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    for layer in layers:
        if not isinstance(layer, str) or layer not in modules:
            near = difflib.get_close_matches(str(layer), modules, n=4, cutoff=0.3) or list(modules)[:4]
            raise InputError(
                f"train.affinity_opt.layers: there is no module '{layer}' in the {role}, {type(network).__name__}; "
                f'near names are {", ".join(near)}'
            )
    return [modules[layer] for layer in layers]
