"""`metrics.jsonl`: a line is there whole or not at all, and none twice after a resume."""

import json
import math

import pytest

from lora_sr.errors import InputError
from lora_sr.metrics_file import Metrics, read_metrics


def train(iteration):
    return {'iter': iteration, 'losses': {'l_pix': 1 / iteration}}


def validation(iteration, value):
    return {'iter': iteration, 'validation': 'Set5', 'metrics': {'psnr': value}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'metrics.jsonl'


def written(file, *lines, **options):
    metrics = Metrics(file, **options)
    for line in lines:
        metrics.add(line)
    return read_metrics(file)


def test_what_is_added_is_read(file):
    lines = [train(1), {'iter': 1, 'lr': [1e-3, 5e-4], 'memory': None}, validation(1, 30.25)]
    assert written(file, *lines) == lines
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines


def test_what_json_cannot_hold(file):
    (line,) = written(file, {'iter': 1, 'metrics': {'a': math.inf, 'b': -math.inf, 'c': math.nan}})
    assert line['metrics'] == {'a': 'inf', 'b': '-inf', 'c': 'nan'}
    json.loads(file.read_text(), parse_constant=pytest.fail)


def test_a_line_that_a_kill_has_cut(file):
    written(file, train(1), train(2))
    whole = file.read_bytes()
    for length in range(whole.index(b'\n') + 1, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert read_metrics(file) == [train(1)]
        assert written(file, train(2), done=1) == [train(1), train(2)]  # it is not a part of the next
        assert file.read_bytes() == whole


@pytest.mark.parametrize('line', ['[]', '3', '{"a": 1}', '{"iter": "x"}', '\ud800', '[' * 9999, ''])
def test_what_is_no_line(file, line):
    file.write_text(f'{line}\n{{"iter": 2}}\n', errors='surrogatepass')
    assert read_metrics(file) == [{'iter': 2}]


@pytest.mark.parametrize(('validates', 'again'), [(False, []), (True, [validation(4, 1.0)])])
def test_a_run_that_goes_on_has_no_line_twice(file, validates, again):
    early = [train(2), validation(2, 3.0), train(4)]
    written(file, *early, validation(4, 1.0), train(6), {'iter': 6, 'stopped': 'SIGTERM'})
    kept = [*early, *([] if validates else [validation(4, 1.0)])]
    assert written(file, *again, train(6), done=4, validates=validates) == [*kept, *again, train(6)]


def test_nothing_is_dropped_before_there_is_something_new(file):
    written(file, train(2), train(4))
    Metrics(file, done=2)
    assert read_metrics(file) == [train(2), train(4)]


def test_what_cannot_be_read_or_written(tmp_path):
    with pytest.raises(InputError, match='metrics .* cannot be read: No such file'):
        read_metrics(tmp_path / 'none.jsonl')
    with pytest.raises(InputError, match='must be a file, got a folder'):
        read_metrics(tmp_path)
    with pytest.raises(InputError, match='cannot be written: No such file'):
        Metrics(tmp_path / 'none/metrics.jsonl').add({'iter': 1})
