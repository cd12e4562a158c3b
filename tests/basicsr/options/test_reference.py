"""What is written from the schema of options: the page, the JSON Schema for editors, and that both are up to date."""

import dataclasses
import importlib.util
import inspect
import json
import os
import re

import pytest
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from tiny_run import REPOSITORY, change

from lora_sr.adapters import LoRAConfig
from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import find
from lora_sr.option_file import load_options

jsonschema = pytest.importorskip('jsonschema')

SCRIPT = REPOSITORY / 'scripts' / 'option_reference.py'
SHIPPED = sorted((REPOSITORY / 'options').rglob('*.yml'))
TRAIN, TEST = (REPOSITORY / 'options' / kind / 'SPAN' / f'{kind}_SPAN_ch26_x4.yml' for kind in ('train', 'test'))


@pytest.fixture(scope='module')
def reference():
    spec = importlib.util.spec_from_file_location('option_reference', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def validator():
    content = json.loads((REPOSITORY / 'options' / 'schema.json').read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def plain(file) -> dict:
    return json.loads(json.dumps(load_options(file)))


def test_committed_files_are_up_to_date(reference):
    for file, text in ((reference.DOCUMENT, reference.document()), (reference.SCHEMA, reference.json_text())):
        assert file.read_text() == text, f'run {reference.COMMAND}'


@pytest.mark.parametrize('file', SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_name_the_schema_and_fit_it(file, validator):
    first = file.read_text().splitlines()[0]
    assert (
        first == f'# yaml-language-server: $schema={os.path.relpath(REPOSITORY / "options/schema.json", file.parent)}'
    )
    assert [f'{error.json_path}: {error.message}' for error in validator.iter_errors(plain(file))] == []


@pytest.mark.parametrize(
    ('file', 'path', 'value', 'places'),
    [
        (TRAIN, 'epochs', 1, ['$']),
        (TRAIN, 'logger', ..., ['$']),
        (TRAIN, 'imports', 'mine.py', ['$.imports']),
        (TRAIN, 'imports', ['mine.py'], []),
        (TRAIN, 'x-mine', {'a': 1}, []),
        (TRAIN, 'train.use_amp', True, ['$.train']),
        (TRAIN, 'train.optim_g', ..., ['$.train']),
        (TRAIN, 'train.optim_g.lr', ..., ['$.train.optim_g']),
        (TRAIN, 'train.ema_decay', 1, ['$.train.ema_decay']),
        (TRAIN, 'train.scheduler.gama', 1, ['$.train.scheduler']),
        (TRAIN, 'train.pixel_opt.eps', 1, ['$.train.pixel_opt']),
        (TRAIN, 'val.save_best', 1, ['$.val']),
        (TRAIN, 'val.metrics.psnr.crop', 1, ['$.val.metrics.psnr']),
        (TRAIN, 'path.strict', 1, ['$.path']),
        (TRAIN, 'network_g.feature_channel', 1, ['$.network_g']),
        (TRAIN, 'network_g', {'type': 'Mine', 'a': 1}, []),
        (TRAIN, 'datasets.train.gt_size', ..., ['$.datasets.train']),
        (TRAIN, 'datasets.train.use_shuffle', True, ['$.datasets.train']),
        (TRAIN, 'datasets.valid', {}, ['$.datasets']),
        (TRAIN, 'model_type', 'SRGANModel', ['$', '$.train', '$.train']),
        (TRAIN, 'model_type', 'Mine', []),
        (TEST, 'val', ..., ['$']),
        (TEST, 'val.suffix', ..., ['$.val']),
        (TEST, 'val.save_img', False, []),
    ],
)
def test_json_schema_finds_mistakes(validator, file, path, value, places):
    options = plain(file)
    change(options, path, value)
    assert [error.json_path for error in validator.iter_errors(options)] == places


def read_keys(entry: type, variables: str) -> set[str]:
    """The keys that a class and its bases read from such a variable."""
    text = ''.join(inspect.getsource(base) for base in entry.__mro__ if base.__module__.startswith('basicsr.'))
    text = text.replace('"', "'")
    found = re.findall(rf"\b(?:{variables})(?:\[|\.get\()'(\w+)'|'(\w+)' in (?:self\.)?opt\b", text)
    return {name for pair in found for name in pair if name}


@pytest.mark.parametrize('name', schema.DATASETS.split())
def test_schema_has_all_that_data_sets_of_basicsr_read(name):
    made = {'phase', 'scale', 'db_paths', 'client_keys'}  # by BasicSR itself
    known = {key for key, entry in schema.DATASET.items() if entry.is_known({name})}
    assert read_keys(find(DATASET_REGISTRY, name), 'opt') - made <= known


@pytest.mark.parametrize('name', schema.MODELS.split())
def test_schema_has_all_that_models_of_basicsr_read(name):
    model = find(MODEL_REGISTRY, name)
    for section, variables in (('train', r"train_opt|opt\['train'\]"), ('val', r"opt\['val'\]")):
        known = {key for key, entry in schema.SECTIONS[section].items() if entry.is_known({name})}
        # DistillationModel replaces what SRModel does with the loss of features.
        assert read_keys(model, variables) - {'perceptual_opt'} <= known


def test_section_of_lora_is_that_of_the_config():
    fields = {field.name: field.default for field in dataclasses.fields(LoRAConfig)}
    assert set(schema.LORA) == set(fields)
    assert schema.LORA['rank'].default == fields['rank']
