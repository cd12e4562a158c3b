"""``docs/options.md`` and ``options/schema.json``, written from the schema and the registries.

``python scripts/option_reference.py`` writes both. What they say of networks, losses, metrics and schedulers comes from
signatures, as what the check knows does.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lora_sr  # noqa: F401  (BasicSR may not be importable before)

# isort: split
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY

from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import OWN_MODULES
from lora_sr.basicsr.options.schema import Key
from lora_sr.basicsr.options.training import SCHEDULERS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT, SCHEMA = REPOSITORY / 'docs' / 'options.md', REPOSITORY / 'options' / 'schema.json'
COMMAND = 'python scripts/option_reference.py'
IGNORED = '^x-'

INTRODUCTION = f"""\
# Options

<!-- Written by `{COMMAND}`; change lora_sr/basicsr/options/schema.py instead. -->

Every key of an option file: BasicSR's own and ours. `lora-sr train`, `lora-sr test`, and a `train.py` of your own that
imports `lora_sr`, check the file before the run, and tell all that is wrong at once, a sentence each: what is missing,
values of the wrong kind, keys that nobody reads, files that do not exist, checkpoints and data that do not fit.
`LORA_SR_CHECK=0` in the environment switches the check off.

**Unknown keys.** BasicSR ignores a key that it does not know. Here each one is told, with its nearest neighbor.

- A key that begins with `x-` is left alone, at the top of the file and in `path`, `train`, `val`, `logger` and a data
  set: for notes, and for what the file repeats, e.g. `x-backend: &backend {{type: lmdb}}`, then `io_backend: *backend`.
- A model or dataset of your own may read what it likes: with a `model_type`, or a dataset's `type`, that is neither
  BasicSR's nor ours, a key is told only where it is almost a known one. What your class inherits from BasicSR's is
  checked, but nothing of it has to be there.
- What a class of BasicSR's reads in your clone is known, too, where its code says `opt['KEY']` or `opt.get('KEY')`.
- Sections with a `type` (networks, losses, optimizers, the scheduler, metrics) go to that class or function; the keys
  are its arguments, also those of your own.

**In an editor.** [`options/schema.json`](../options/schema.json) is a JSON Schema; an editor with YAML support
completes keys, explains them and underlines mistakes in a file that begins with
`# yaml-language-server: $schema=PATH/TO/options/schema.json`, as the files in `options/` do.

**Twins.** A file `options/test/METHOD/test_….yml` tests what every `options/train/METHOD/train_….yml` trains whose name
holds all of its parts, in their order: `test_LKDN_x4` is for `train_LKDN_x4` and `train_LKDN_x4_adam`. Where several
do, the longest is the twin: `test_LKDN_x4_lora` is `train_LKDN_x4_lora`'s. Its network takes that training's
checkpoint: `--force_yml path:pretrain_network_g=experiments/NAME/models/net_g_latest.pth`.
"""

SECTIONS = {
    '': ('The top of the file', f'LR images are made on the fly by {" and ".join(schema.DEGRADING.split())}.'),
    'datasets.*': ('`datasets.*`', 'A dataset: `train`; `val`, `val_2`, …; `test`, `test_2`, ….'),
    'datasets.*.io_backend': ('`datasets.*.io_backend`', ''),
    'network_g.lora': ('`network_*.lora`', 'In the section of an `AdaptSR`, beside `base`, the section of a network.'),
    'network_t': ('`network_t`', 'Beside the type of the teacher and its arguments.'),
    'path': ('`path`', ''),
    'train': ('`train`', 'In a training.'),
    'val': ('`val`', ''),
    'logger': ('`logger`', 'In a training.'),
    'logger.wandb': ('`logger.wandb`', ''),
    'dist_params': ('`dist_params`', ''),
}
# What is always so where a section is read at all.
GIVEN = {'train': {'train'}, 'logger': {'train'}}
PHASES = {'train': 'in a training', 'test': 'in a test', **schema.FACTS}


def own(registry: Iterable) -> dict[str, Callable]:
    """What is BasicSR's and ours in a registry, by the names that an option file gives it."""
    entries = registry.items() if isinstance(registry, dict) else registry
    found = {name: entry for name, entry in entries if entry.__module__.startswith(OWN_MODULES)}
    return {name.replace('_basicsr', ''): entry for name, entry in sorted(found.items())}


def parameters(function: Callable, supplied: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """The parameters that a section gives."""
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in supplied]


# --- the document ---


def document() -> str:
    """The text of ``docs/options.md``."""
    parts = [INTRODUCTION]
    for name, (title, text) in SECTIONS.items():
        parts.append('\n'.join([f'## {title}\n', *([f'{text}\n'] if text else []), *_table(name)]))
    for title, registry, supplied in (
        ('Networks: `network_*`', ARCH_REGISTRY, ()),
        ('Losses: `train.*_opt`', LOSS_REGISTRY, ()),
        ('Metrics: `val.metrics.*`', METRIC_REGISTRY, ('img', 'img2')),
        ('Schedulers: `train.scheduler`', SCHEDULERS, ('optimizer', 'last_epoch')),
    ):
        rows = [f'| `{name}` | {_arguments(entry, supplied)} |' for name, entry in own(registry).items()]
        parts.append('\n'.join([f'## {title}\n', '| `type` | Keys, with their defaults |', '| --- | --- |', *rows]))
    parts.append(
        '## Optimizers: `train.optim_*`\n\n`type` is a class of `torch.optim`, `Adan`, one that is registered in '
        '`OPTIMIZER_REGISTRY`, or\n`package.Class` of an installed package, e.g. `pytorch_optimizer.SOAP`. `lr` has to '
        'be there, and the other keys are its arguments.'
    )
    return '\n\n'.join(part.strip() for part in parts) + '\n'


def _arguments(function: Callable, supplied: tuple[str, ...]) -> str:
    shown = [
        f'`{p.name}`' if p.default is p.empty else f'`{p.name}: {_plain(p.default)}`'
        for p in parameters(function, supplied)
    ]
    return ', '.join(shown)


def _plain(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return '~' if value is None else json.dumps(value).strip('"') or "''"
    return str(list(value)) if isinstance(value, tuple) else getattr(value, '__name__', repr(value))


def _table(section: str) -> list[str]:
    rows = ['| Key | Value | Default | Meaning |', '| --- | --- | --- | --- |']
    for name, key in schema.SECTIONS[section].items():
        default = '' if key.default is None else f'`{_plain(key.default)}`'
        needed = _needed(key, GIVEN.get(section, set()))
        scope = _scope(key, section)
        rows.append(f'| `{name}` | {key.kind.text} | {needed or default} | {key.help}{scope} |')
    return rows


def _needed(key: Key, given: set[str]) -> str:
    if key.is_needed(given | {'train'}) and key.is_needed(given | {'test'}):
        return '**needed**'
    if given and key.is_needed(given):
        return '**needed**'
    texts = []
    for facts, names in choices(key.needed).items():
        words = [PHASES[fact] for fact in facts if fact not in given]
        words += [f'with {", ".join(f"`{name}`" for name in names)}'] if names else []
        texts.append(f'**needed** {" ".join(words)}')
    return '; '.join(texts)


def _scope(key: Key, section: str) -> str:
    names = (schema.DATASETS if section.startswith('datasets') else schema.MODELS).split()
    names = ['memcached'] if key.only == 'memcached' else names
    readers = [name for name in names if key.only and key.is_known({name})]
    if not key.only:
        return ''
    others = [name for name in names if name not in readers]
    word, shown = ('Not with', others) if len(others) < len(readers) and others else ('With', readers)
    return f' {word} {", ".join(f"`{name}`" for name in shown)}.'


def choices(condition: str) -> dict[tuple[str, ...], list[str]]:
    """A condition as alternatives: facts that hold together, and with them one of some models or datasets, if any."""
    known = {*schema.MODELS.split(), *schema.DATASETS.split()}
    found: dict[tuple[str, ...], list[str]] = {}
    for choice in condition.split():
        facts = choice.split('&')
        names = found.setdefault(tuple(fact for fact in facts if fact not in known), [])
        names += [fact for fact in facts if fact in known]
    return found


# --- the JSON Schema ---


def json_schema() -> dict:
    """``options/schema.json``, a JSON Schema of draft 2020-12.

    It says what a file alone can: the kinds of values, and with the names that it knows, which keys are read and which
    are needed. Models, datasets, networks … of others may hold anything.
    """
    top = _section('', schema.MODELS, 'model_type')
    properties = top['properties']
    for name in ('path', 'train', 'val'):
        section = _section(name, schema.MODELS, None)
        properties[name].update(
            {key: section[key] for key in ('properties', 'patternProperties', 'required') if key in section}
        )
        for rule in _names(name, schema.MODELS):
            top['allOf'].append({'if': _is('model_type', rule[0]), 'then': {'properties': {name: rule[1]}}})
        for condition, keys in _conditions(name):
            top['allOf'].append({'if': condition, 'then': {'properties': {name: {'required': keys}}}})
    for name in ('g', 'd', 't'):
        own_keys = {'properties': _properties('network_t')}
        if name != 't':
            own_keys = {'propertyNames': {'not': {'enum': list(schema.TEACHER)}}}
        properties[f'network_{name}'] = {**properties[f'network_{name}'], **own_keys, '$ref': '#/$defs/network'}
    train = properties['train']['properties']
    for name, section in train.items():
        if name.endswith('_opt'):
            section['anyOf'] = [
                {'$ref': f'#/$defs/{"affinity" if name == "affinity_opt" else "loss"}'},
                {'type': 'null'},
            ]
        elif name.startswith('optim_'):
            section['$ref'] = '#/$defs/optimizer'
    train['scheduler']['$ref'] = '#/$defs/scheduler'
    properties['val']['properties']['metrics']['additionalProperties'] = {'$ref': '#/$defs/metric'}
    properties['logger'] |= _closed('logger')
    properties['logger']['properties']['wandb'] |= _closed('logger.wandb')
    properties['dist_params'] |= _closed('dist_params')
    properties['datasets'] |= {
        'properties': {'train': {'$ref': '#/$defs/train_set'}},
        'patternProperties': {'^(val|test)(_.*)?$': {'$ref': '#/$defs/test_set'}},
        'additionalProperties': False,
    }
    return {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'An option file of BasicSR and lora_sr',
        '$comment': f'Written by `{COMMAND}`.',
        **top,
        '$defs': {
            'train_set': _section('datasets.*', schema.DATASETS, 'type', 'train'),
            'test_set': _section('datasets.*', schema.DATASETS, 'type', 'test'),
            'network': _typed(ARCH_REGISTRY, ours=tuple(schema.TEACHER)),
            'loss': _typed(LOSS_REGISTRY),
            'affinity': _typed(LOSS_REGISTRY, ours=('layers',)),
            'metric': _typed(METRIC_REGISTRY, ours=('better',), supplied=('img', 'img2')),
            'scheduler': _typed(SCHEDULERS, supplied=('optimizer', 'last_epoch')),
            'optimizer': {
                'properties': {'type': {'type': 'string'}, 'lr': schema.number().json},
                'required': ['type', 'lr'],
            },
        },
    }


def _properties(section: str) -> dict:
    found = {}
    for name, key in schema.SECTIONS[section].items():
        default = {} if key.default is None else {'default': key.default}
        found[name] = {**key.kind.json, 'description': key.help, **default}
    return found


def _closed(section: str) -> dict:
    needed = [name for name, key in schema.SECTIONS[section].items() if key.is_needed({'train'})]
    return {
        'properties': _properties(section),
        'patternProperties': {IGNORED: {}},
        'additionalProperties': False,
        **({'required': needed} if needed else {}),
    }


def _section(section: str, names: str, kind: str | None, phase: str | None = None) -> dict:
    """A section whose keys depend on a name under ``kind``, in itself; for None, in the top of the file."""
    entries = schema.SECTIONS[section]
    needed = [name for name, key in entries.items() if key.is_needed({'train'}) and key.is_needed({'test'})]
    needed = needed or [name for name, key in entries.items() if section in GIVEN and key.needed == 'train']
    found: dict[str, Any] = {
        'type': 'object',
        'properties': _properties(section),
        'patternProperties': {IGNORED: {}},
        **({'required': needed} if needed else {}),
    }
    if kind:
        found['properties'][kind] = {
            **found['properties'][kind],
            'anyOf': [{'enum': names.split()}, {'type': 'string'}],
        }
        found['allOf'] = [{'if': _is(kind, group), 'then': rule} for group, rule in _names(section, names)]
        found['allOf'] += [{'if': rule, 'then': {'required': keys}} for rule, keys in _conditions(section, phase)]
    return found


def _is(kind: str, names: list[str]) -> dict:
    return {'properties': {kind: {'enum': names}}, 'required': [kind]}


def _names(section: str, names: str) -> list[tuple[list[str], dict]]:
    """The keys that are read with each model or dataset; those with the same ones together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for reader in names.split():
        keys = tuple(name for name, key in schema.SECTIONS[section].items() if key.is_known({reader}))
        groups.setdefault(keys, []).append(reader)
    return [
        (readers, {'propertyNames': {'anyOf': [{'enum': list(keys)}, {'pattern': IGNORED}]}})
        for keys, readers in groups.items()
    ]


def _conditions(section: str, phase: str | None = None) -> list[tuple[dict, list[str]]]:
    """Conditions, each with the keys that are needed under it; ``phase`` is known of a dataset."""
    facts = {
        'train': {'required': ['train']},
        'test': {'not': {'required': ['train']}},
        'degrading': {
            'required': ['train'],
            **{
                'properties': {
                    'high_order_degradation': {'not': {'const': False}},
                    'model_type': {'enum': schema.DEGRADING.split()},
                }
            },
        },
        'saving': {'properties': {'val': {'properties': {'save_img': {'const': True}}}}},
        'folder': {'properties': {'io_backend': {'properties': {'type': {'const': 'disk'}}}}},
    }
    kind = 'type' if phase else 'model_type'
    found: dict[str, list[str]] = {}
    for name, key in schema.SECTIONS[section].items():
        if key.is_needed({'train'}) and key.is_needed({'test'}):
            continue
        for needed, readers in choices(key.needed).items():
            if phase and {'train': 'test', 'test': 'train'}[phase] in needed:
                continue
            rules = [facts[fact] for fact in needed if fact != phase and not (section in GIVEN and fact == 'train')]
            rules += [_is(kind, readers)] if readers else []
            if rules or phase:
                found.setdefault(
                    json.dumps(rules[0] if len(rules) == 1 else {'allOf': rules} if rules else True), []
                ).append(name)
    return [(json.loads(rule), keys) for rule, keys in found.items()]


def _typed(registry: Iterable, ours: tuple[str, ...] = (), supplied: tuple[str, ...] = ()) -> dict:
    """A section that goes to what its ``type`` names."""
    rules = []
    for name, entry in own(registry).items():
        given = parameters(entry, supplied)
        properties = {p.name: {'default': p.default} if _is_json(p.default) else {} for p in given}
        if name == 'AdaptSR':
            lora = {'properties': _properties('network_g.lora'), 'additionalProperties': False}
            properties = {'base': {'$ref': '#/$defs/network'}, 'lora': lora}
        then = {
            'properties': properties,
            'propertyNames': {'enum': ['type', *properties, *ours]},
            'required': [p.name for p in given if p.default is p.empty],
        }
        rules.append({'if': _is('type', [name]), 'then': then})
    kind = {'anyOf': [{'enum': list(own(registry))}, {'type': 'string'}]}
    return {'type': 'object', 'properties': {'type': kind}, 'required': ['type'], 'allOf': rules}


def _is_json(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def json_text() -> str:
    """The text of ``options/schema.json``."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + '\n'


def main() -> None:
    """Write both files."""
    for path, text in ((DOCUMENT, document()), (SCHEMA, json_text())):
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
