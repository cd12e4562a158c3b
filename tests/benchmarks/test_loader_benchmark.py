"""The comparison of loaders: it runs, on batches of the same kind, and says what it cannot measure."""

import pytest

from lora_sr.benchmarks import loader
from lora_sr.errors import InputError


@pytest.mark.slow
def test_prints_its_rates(tmp_path, make_images, capsys):
    folder = make_images(tmp_path / 'photos', [(500, 490), (480, 720)])
    (tmp_path / 'work').mkdir()
    rates = loader.run([folder], 4, [0, 1], batch_size=2, lq_size=16, work_dir=tmp_path / 'work', seconds=0.2)
    assert rates.keys() == {(kind, workers) for kind in loader.KINDS for workers in (0, 1)}
    lines = capsys.readouterr().out.splitlines()
    for workers, line in enumerate(lines[-2:]):
        png, raw = (rates[kind, workers] for kind in loader.KINDS)
        assert line.split() == [str(workers), f'{png:,.0f}', f'{raw:,.0f}', f'{raw / png:.1f}']
    assert not list((tmp_path / 'work').iterdir())


def test_refuses_what_it_cannot_measure(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(100, 700)])
    with pytest.raises(InputError, match='must have 480 pixels each way, got 700 x 100'):
        loader.run([folder])
    with pytest.raises(InputError, match='--scale must be a divisor of 240 from 2, got 7'):
        loader.run([folder], 7)
    with pytest.raises(InputError, match='--workers must be whole numbers of at least 0, got 0 -1'):
        loader.run([folder], workers=[0, -1])
