"""How many threads are left beside other jobs, against the times of processors that stand in a file."""

import os
import sys

import pytest

from lora_sr import threads


@pytest.fixture
def leave_room(tmp_path, monkeypatch):
    """A function: look while each of four processors is busy for so many of 100 ticks. Gives the number of threads."""
    for name in (*threads.VARIABLES, 'WORLD_SIZE', 'SLURM_NTASKS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, 'torch')
    monkeypatch.setattr(threads, '_chosen', False)
    monkeypatch.setattr(threads, '_looks', False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, 'STAT', tmp_path / 'stat')

    def write(*busy):
        rows = [f'cpu{n} {1000 + ticks} 0 0 {1100 - ticks} 0 0 0 0 {ticks} 0' for n, ticks in enumerate(busy)]
        threads.STAT.write_text('\n'.join(['cpu  9 9 9 9 9 9 9 9 9 9', *rows, 'cpu9 9 0 0 9 0 0 0 0 0 0', 'intr 5']))

    def look(*busy, by=threads.leave_room):
        threads.STAT.write_text('\n'.join(f'cpu{number} 1000 0 0 1000 0 0 0 0 0 0' for number in range(len(busy))))
        monkeypatch.setattr(threads.time, 'sleep', lambda _: write(*busy))
        by()
        return os.environ.get('OMP_NUM_THREADS')

    yield look
    os.environ.pop('OMP_NUM_THREADS', None)


@pytest.mark.parametrize(
    ('busy', 'count'),
    [
        ((0, 0, 0, 0), None),
        ((5, 10, 20, 5), None),  # what a desktop does by itself
        ((100, 0, 0, 0), '3'),
        ((50, 50, 5, 0), '3'),  # one that moves about
        ((100, 100, 0, 0), '2'),
        ((100, 100, 100, 100), '1'),
        ((100, 0), '1'),
        ((100,), None),  # there is nothing to choose
    ],
)
def test_a_thread_for_each_processor_that_is_free(leave_room, busy, count):
    assert leave_room(*busy) == count
    assert threads.is_chosen()


@pytest.mark.parametrize('name', [*threads.VARIABLES, 'WORLD_SIZE', 'SLURM_NTASKS'])
def test_what_the_user_or_a_launcher_has_set_stays(leave_room, monkeypatch, name):
    monkeypatch.setenv(name, '2')
    assert leave_room(100, 100, 0, 0) == ('2' if name == 'OMP_NUM_THREADS' else None)
    assert threads.is_chosen() == (name != 'OMP_NUM_THREADS')


def test_torch_that_has_been_loaded_does_not_look_again(leave_room, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', object())
    assert leave_room(100, 100, 0, 0) is None


class Torch:
    count = 0

    def set_num_threads(self, count):
        self.count = count


def test_a_second_look_chooses_for_what_follows(leave_room, monkeypatch):
    torch = Torch()
    assert leave_room(100, 100, 100, 0) == '1'
    monkeypatch.setitem(sys.modules, 'torch', torch)
    for busy, count in (((0, 0, 0, 0), 4), ((100, 0, 0, 0), 3), ((100, 100, 100, 100), 1)):
        leave_room(*busy, by=threads.look_again)
        assert torch.count == count


@pytest.mark.parametrize('why', ['set by the user', 'not begun here', 'not told'])
def test_a_second_look_leaves_alone_what_is_not_for_it_to_choose(leave_room, monkeypatch, why):
    torch = Torch()
    if why == 'set by the user':
        monkeypatch.setenv('OMP_NUM_THREADS', '2')
    if why != 'not begun here':
        leave_room(100, 0, 0, 0)
    if why == 'not told':
        monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setitem(sys.modules, 'torch', torch)
    leave_room(100, 100, 0, 0, by=threads.look_again)
    assert torch.count == 0


def test_a_system_that_does_not_tell(leave_room, monkeypatch):
    monkeypatch.delattr(os, 'sched_getaffinity')
    assert leave_room(100, 100, 0, 0) is None
