"""The benchmark of `lora-sr upscale` measures what it says, and prints it."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_sr.archs.span import SPAN
from lora_sr.benchmarks import upscale as upscale_benchmark
from lora_sr.deploy.upscale import plan, run_jobs
from lora_sr.errors import InputError
from lora_sr.runtime.upscaler import Upscaler


@pytest.fixture
def images(tmp_path):
    torch.manual_seed(0)
    torch.save({'params': SPAN(feature_channels=6, upscale=2, deploy=True).state_dict()}, tmp_path / 'SPAN.pth')
    (tmp_path / 'in/sub').mkdir(parents=True)
    for number, name in enumerate(('a.png', 'b.jpg', 'sub/c.png')):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'in' / name)
    return tmp_path


def test_both_ways_write_the_same(images):
    upscaler = Upscaler(SPAN(feature_channels=6, upscale=2).eval())
    files = {}
    for name, way in (('turn', upscale_benchmark.in_turn), ('once', run_jobs)):
        jobs, _ = plan([images / 'in'], images / name)
        (images / name / 'sub').mkdir(parents=True)
        result = way(jobs, upscaler)
        files[name] = [job.target.read_bytes() for job in jobs]
        assert len(jobs) == 3 and (result == {} or min(result) > 0)
    assert files['turn'] == files['once']


def test_printed_sums(images, capsys):
    upscale_benchmark.run([images / 'in'], images / 'SPAN.pth', repeats=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('SPAN x2, float32, 3 images, ')
    values = {line[:22].strip(): float(line[22:31]) for line in lines[1:]}
    in_turn = values['reading'] + values['network'] + values['writing']
    assert values['one after the other'] == pytest.approx(in_turn, abs=0.02)
    assert set(values) == {'reading', 'network', 'writing', 'one after the other', 'lora-sr upscale', 'ratio'}


def test_a_broken_image_is_named(images):
    (images / 'in/broken.png').write_text('text')
    with pytest.raises(InputError, match='broken.png is not a PNG'):
        upscale_benchmark.run([images / 'in'], images / 'SPAN.pth', repeats=1)
