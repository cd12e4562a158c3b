"""The comparison with BasicSR's scripts: it runs, and both ways make the same databases."""

import pytest

from lora_sr.benchmarks import prepare as prepare_benchmark
from lora_sr.errors import InputError


@pytest.mark.slow
def test_prints_its_ratio(tmp_path, make_images, capsys):
    folder = make_images(tmp_path / 'photos', [(500, 490), (480, 720), (100, 700)])
    (tmp_path / 'work').mkdir()
    more = make_images(tmp_path / 'more', [(480, 480)])
    result = prepare_benchmark.run([folder, more / '0001.png'], 4, tmp_path / 'work')
    assert (result['images'], result['entries']) == (3, 4 + 2 + 1)
    assert result['ratio'] == result['basicsr_s'] / result['lora_sr_s'] > 0
    assert f'lora-sr prepare is {result["ratio"]:.2f} times as fast as BasicSR' in capsys.readouterr().out
    assert not list((tmp_path / 'work').iterdir())


def test_refuses_images_that_basicsr_cannot_cut(tmp_path, make_images):
    folder = make_images(tmp_path / 'photos', [(100, 700)])
    with pytest.raises(InputError, match='none of the 1 images has 480 x 480'):
        prepare_benchmark.run(folder, 4)
    with pytest.raises(InputError, match='--scale: 7'):
        prepare_benchmark.run(folder, 7)
