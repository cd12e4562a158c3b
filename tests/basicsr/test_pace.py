"""The time that a run still has, against a run whose times are known."""

import pytest
import torch

from lora_sr.basicsr.pace import Pace, peak_memory

ITERATION, FIRST, VALIDATION, SAVING = 2.0, 60.0, 100.0, 7.0  # seconds
FREQUENCIES = {'validation': 10, 'saving': 4}


class Run:
    """A run of 40 iterations; what it told of its end, by iteration."""

    def __init__(self, start):
        self.now = 1000.0
        self.pace = Pace(start, 40, lambda: self.now)
        self.told, self.samples = {}, {}
        for iteration in range(start + 1, 41):
            self.pace.begin(iteration - 1)
            self.now += FIRST if iteration == start + 1 else ITERATION
            self.samples[iteration] = self.pace.lately(iteration)
            self.told[iteration] = self.now + self.pace.left(iteration, FIRST, FREQUENCIES)
            for what, frequency, seconds in (('saving', 4, SAVING), ('validation', 10, VALIDATION)):
                if iteration % frequency == 0:
                    for part in (0.25, 0.75):  # two files, two sets
                        with self.pace.apart(what, iteration):
                            self.now += part * seconds


@pytest.mark.parametrize('start', [0, 16])
def test_the_end_is_foreseen_as_soon_as_all_has_come_once(start):
    run = Run(start)
    known = [iteration for iteration in run.told if iteration > start + 10]
    assert [run.told[iteration] for iteration in known] == pytest.approx([run.now] * len(known))
    assert run.told[start + 2] < run.now  # no validation is known yet


def test_seconds_of_an_iteration_are_its_own():
    samples = Run(0).samples
    assert samples.pop(1) is None  # in which processes start
    assert list(samples.values()) == pytest.approx([ITERATION] * 39)


def test_a_part_of_a_validation_does_not_count_twice():
    now = [0.0]
    pace = Pace(0, 20, lambda: now[0])
    with pace.apart('validation', 10):
        with pace.apart('saving', 10):  # of its best network
            now[0] += 5
        now[0] += 5
    assert pace.left(11, 1.0, FREQUENCIES) == 9 * 1.0 + 10.0


def test_peak_memory():
    before = peak_memory(torch.device('cpu'))
    if before is None:
        pytest.skip('this system does not tell')
    held = torch.ones(2**28)  # 1 GiB
    assert peak_memory(torch.device('cpu')) >= max(before, held.numel() * 4)
