"""The samples of a run: BasicSR's order, random numbers of their own, and the same from any place on."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader
from basicsr.data.data_sampler import EnlargedSampler

from lora_sr.basicsr.samples import Sample, SampleStream, SeededDataset, seed_process, stream_of
from lora_sr.errors import InputError


class Draws(torch.utils.data.Dataset):
    """Each sample is its index and three random numbers, of Python, numpy and torch."""

    def __init__(self, count=7):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def begin(count=7, ratio=3, processes=1, rank=0, batch=2, total=40, state=None, seed=None, drawn=5):
    """The stream of one process of a run, its last epoch, and the options."""
    stream = SampleStream(EnlargedSampler(range(count), processes, rank, ratio), drawn)
    opt = {'train': {'total_iter': total}, 'path': {'training_states': f'states of {id(stream)}'}}
    return stream, stream.begin(opt, batch, state or {}, seed), opt


def train(stream, last_epoch, batch, start=(0, 0)):
    """The loop of BasicSR's `train_pipeline`: (epoch, iteration) -> the batch."""
    first_epoch, iteration = start
    batches = {}
    for epoch in range(first_epoch, last_epoch + 1):
        stream.sampler.set_epoch(epoch)
        samples = list(stream)
        for first in range(0, len(samples) - batch + 1, batch):
            iteration += 1
            batches[epoch, iteration] = samples[first : first + batch]
    return batches


RUNS = [
    dict(count=7, ratio=3, batch=2, total=40),  # a sample is left over in each epoch
    dict(count=8, ratio=1, batch=4, total=9),
    dict(count=5, ratio=1, batch=3, total=20),  # an epoch of one batch: BasicSR's run ends after 11
    dict(count=5, ratio=2.5, batch=2, total=30),
    dict(count=6, ratio=100, batch=4, total=25, processes=2, rank=0),
    dict(count=7, ratio=2, batch=3, total=25, processes=2, rank=1),
]


@pytest.mark.parametrize('run', RUNS)
def test_a_run_has_all_its_iterations_in_the_order_of_basicsr(run):
    stream, last_epoch, _ = begin(**run)
    batches = train(stream, last_epoch, run['batch'])
    assert [iteration for _, iteration in batches] == list(range(1, run['total'] + 1))
    sampler = EnlargedSampler(range(run['count']), run.get('processes', 1), run.get('rank', 0), run['ratio'])
    for epoch, ours in itertools.groupby(batches, lambda place: place[0]):
        sampler.set_epoch(epoch)
        indices = [sample.index for place in ours for sample in batches[place]]
        assert indices == list(sampler)[: len(indices)]
    seeds = [sample.seed for samples in batches.values() for sample in samples]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize('run', RUNS)
def test_a_run_that_goes_on_sees_what_it_would_have_seen(run):
    stream, last_epoch, _ = begin(**run)
    whole = train(stream, last_epoch, run['batch'])
    for place in whole:
        epoch, iteration = place
        state = {'epoch': epoch, 'iter': iteration, 'lora_sr': {'samples': stream.record(epoch, iteration)}}
        rest, last_epoch, _ = begin(**run, state=state, drawn=77)
        after = train(rest, last_epoch, run['batch'], place)
        assert after == {place: whole[place] for place in whole if place[1] > iteration}
        for later in after:  # a second resume
            assert rest.record(*later) == stream.record(*later)


def test_processes_see_different_samples():
    streams = [begin(processes=2, rank=rank)[0] for rank in range(2)]
    first, second = (set(stream) for stream in streams)
    assert len(first) == len(second) == 10 and not {one.seed for one in first} & {one.seed for one in second}


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_another_batch_size(batch):
    """What an epoch has shown does not come again in it, and the run has all its iterations."""
    stream, last_epoch, _ = begin(batch=4)
    shown = train(stream, last_epoch, 4)
    state = {'epoch': 0, 'iter': 3, 'lora_sr': {'samples': stream.record(0, 3)}}
    rest, last_epoch, _ = begin(batch=batch, state=state)
    after = train(rest, last_epoch, batch, (0, 3))
    assert [iteration for _, iteration in after] == list(range(4, 41))
    seen = {sample for place in shown if place[1] <= 3 for sample in shown[place]}
    assert not seen & {sample for samples in after.values() for sample in samples}


def test_a_state_of_basicsr_itself():
    stream, last_epoch, _ = begin()
    whole = train(stream, last_epoch, 2)
    for (epoch, iteration), _ in list(whole.items())[:-1]:
        rest, last_epoch, _ = begin(state={'epoch': epoch, 'iter': iteration})
        assert train(rest, last_epoch, 2, (epoch, iteration))[epoch + (iteration % 10 == 0), iteration + 1]
        assert rest.start.seen == 2 * (iteration - 10 * epoch)


@pytest.mark.parametrize(('given', 'expected'), [(None, 5), (9, 9)])
def test_seed_of_a_run_that_goes_on(given, expected):
    """A seed that was drawn is the run's; one of the option file is the user's."""
    state = {'epoch': 0, 'iter': 1, 'lora_sr': {'samples': {'seed': 5, 'seen': 2}}}
    assert begin(state=state, seed=given, drawn=31)[0].seed == expected


def test_nothing_left_to_train(basicsr_log):
    state = {'epoch': 4, 'iter': 40, 'lora_sr': {'samples': {'seed': 5, 'seen': 0}}}
    stream, last_epoch, _ = begin(state=state, total=30)
    assert train(stream, last_epoch, 2, (4, 40)) == {}
    assert 'Nothing is left to train: the run is at iteration 40, and train.total_iter is 30.' in basicsr_log.text


def test_an_epoch_of_less_than_a_batch():
    with pytest.raises(InputError, match='batch_size_per_gpu must be at most the 14 samples .*, got 15; raise dataset'):
        begin(ratio=2, batch=15)


def test_stream_of_a_run_is_found_while_it_lasts():
    stream, _, opt = begin()
    assert stream_of(opt) is stream and stream_of({'path': {}}) is None
    del stream
    assert stream_of(opt) is None


# --- random numbers ---


def loader(workers, **section):
    section = {'phase': 'train', 'batch_size_per_gpu': 3, 'num_worker_per_gpu': workers, **section}
    sampler = EnlargedSampler(range(7), 1, 0, 3)
    return build_dataloader(Draws(), section, num_gpu=0, sampler=sampler, seed=4)


def test_samples_are_the_same_whoever_reads_them():
    batches = {workers: [torch.stack(batch).tolist() for batch in loader(workers)] for workers in (0, 1, 3)}
    assert batches[0] == batches[1] == batches[3] and len(batches[0]) == 7
    drawn = [value for batch in batches[0] for row in batch[1:] for value in row]
    assert len(set(drawn)) == len(drawn)  # also of the same image, which comes three times


def test_each_epoch_has_other_crops():
    one = loader(2)
    first = [torch.stack(batch).tolist() for batch in one]
    one.sampler.sampler.set_epoch(1)
    second = [torch.stack(batch).tolist() for batch in one]
    assert not {value for batch in first for value in batch[1]} & {value for batch in second for value in batch[1]}


def test_reading_does_not_touch_what_training_draws():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_process(1, 2)
    expected = draw()
    seed_process(1, 2)
    dataset = SeededDataset(Draws())
    assert dataset[Sample(3, (7, 7))] == dataset[Sample(3, (7, 7))] != dataset[Sample(3, (7, 8))]
    assert draw() == expected


def test_wrapped_dataset_passes_as_its_own():
    dataset = SeededDataset(Draws(3))
    assert dataset.count == len(dataset) == 3 and dataset[1][0] == 1
    copy = pickle.loads(pickle.dumps(dataset))  # as the workers that are spawned get it
    assert copy[Sample(1, (2,))] == dataset[Sample(1, (2,))]
    assert not hasattr(dataset, '__no_such__') and not hasattr(dataset, 'no such')


class Gone(Draws):
    """A data set of files, of which the fifth is gone."""

    paths = [{'gt_path': f'gt/{index}.png'} for index in range(7)]

    def __getitem__(self, index):
        if index == 4:
            open('gt/4.png')
        return index


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_is_gone(workers):
    section = {'phase': 'train', 'batch_size_per_gpu': 3, 'num_worker_per_gpu': workers}
    batches = build_dataloader(Gone(), section, num_gpu=0, sampler=EnlargedSampler(range(7), 1, 0, 3), seed=4)
    with pytest.raises(InputError) as told:
        list(batches)
    assert str(told.value) == "gt/4.png cannot be read: [Errno 2] No such file or directory: 'gt/4.png'"


def test_validation_is_left_alone():
    section = {'phase': 'val', 'batch_size_per_gpu': 1}
    loader = build_dataloader(Gone(), section, seed=1)
    assert not isinstance(loader.dataset, SeededDataset) and loader.dataset.paths is Gone.paths
    with pytest.raises(InputError, match="^gt/4.png cannot be read: .*'gt/4.png'$"):
        list(loader)


@pytest.mark.parametrize('module', ['basicsr.data.x', 'mine'])
def test_values_that_do_not_fit(module):
    """Of BasicSR, as where an image has another size since the run began, a sentence; of others whatever they raise."""

    class Misfit(Draws):
        def __getitem__(self, index):
            raise ValueError('Scale mismatches.', 'LQ (2, 2).')

    Misfit.__module__ = module
    loader = build_dataloader(Misfit(), {'phase': 'val', 'batch_size_per_gpu': 1}, seed=1)
    with pytest.raises(ValueError) as told:
        list(loader)
    is_own = module.startswith('basicsr')
    assert isinstance(told.value, InputError) == is_own
    assert not is_own or str(told.value) == 'sample 0 cannot be read: Scale mismatches. LQ (2, 2).'
