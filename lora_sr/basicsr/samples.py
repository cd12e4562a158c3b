"""The samples of a training run: which, in what order, with what random numbers, and the same after a resume."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from lora_sr.basicsr.pace import Pace
from lora_sr.checkpoints.origin import KEY
from lora_sr.errors import InputError
from lora_sr.metrics_file import Metrics

LOG = logging.getLogger('basicsr')

# By the folder of the run's training states: BasicSR copies its options for the model, which knows no loader.
_streams: weakref.WeakValueDictionary[str, SampleStream] = weakref.WeakValueDictionary()


class Sample(NamedTuple):
    """What a data loader asks for: the index of a sample, and the numbers that seed its random crop and flips."""

    index: Any
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a run is: iterations done, and the samples that this process has seen of the epoch at hand."""

    iteration: int = 0
    epoch: int = 0
    seen: int = 0


class SampleStream(Sampler):
    """The indices of a sampler from the place on where a run is, and no further than the run goes.

    BasicSR goes on with an epoch by beginning it anew. Its option files make an epoch of hundreds of passes through the
    data, so a resumed run would see what it has seen, and never the rest.

    Args:
        sampler: Orders the samples of the epoch that its ``set_epoch`` was told; BasicSR's ``EnlargedSampler``.
        seed: The run's; with epoch and number it seeds each sample.

    Attributes:
        val_loaders, tb_logger: What the run validates on, and the writer of TensorBoard that is told.
        dataset: What the run trains on.
        metrics, pace: Its records, in the process that logs; and how fast it goes.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.batch_size = 1
        self.total_iter: int | None = None
        self.start = Place()
        self.val_loaders: list[Any] = []
        self.tb_logger: Any = None
        self.dataset: Any = None
        self.metrics: Metrics | None = None
        self.pace = Pace()
        self.processes = getattr(sampler, 'num_replicas', 1)
        self.rank = getattr(sampler, 'rank', 0)

    def begin(self, opt: Mapping[str, Any], batch_size: int, state: Mapping[str, Any], seed: int | None) -> int:
        """Begin a run, or go on with one.

        Args:
            opt: The options of the run.
            batch_size: Samples of one process in one iteration.
            state: The training state of the run that goes on, else empty. One of BasicSR's own will do.
            seed: That of the option file; ``None`` for that of the state.

        Returns:
            The last epoch, as BasicSR counts them, from 0.

        Raises:
            InputError: An epoch is less than a batch.
        """
        if len(self) < batch_size:
            raise InputError(
                f'batch_size_per_gpu must be at most the {len(self)} samples that an epoch has for each process, got '
                f'{batch_size}; raise dataset_enlarge_ratio.'
            )
        self.batch_size, self.total_iter = batch_size, int(opt['train']['total_iter'])
        if state:
            self.start = self._place(state)
            self.seed = recorded_of(state, 'samples', int).get('seed', self.seed) if seed is None else seed
            LOG.info(
                f'Going on in epoch {self.start.epoch}, of which {self.start.seen:,} of {len(self):,} samples have '
                f'been seen.'
            )
            if self.start.iteration >= self.total_iter:
                LOG.warning(
                    f'Nothing is left to train: the run is at iteration {self.start.iteration:,}, and train.total_iter '
                    f'is {self.total_iter:,}.'
                )
        self.pace = Pace(self.start.iteration, self.total_iter)
        _streams[opt['path']['training_states']] = self
        left = self.total_iter - self.start.iteration - self._iterations(self.start.epoch)
        return self.start.epoch + max(0, -(-left // self._iterations(self.start.epoch + 1)))

    def record(self, epoch: int, iteration: int) -> dict[str, int]:
        """What a training state says of the samples: the ``seed``, and how many of the epoch all processes saw."""
        seen = self.start.seen if epoch == self.start.epoch else 0
        seen += (iteration - self._iterations_before(epoch)) * self.batch_size
        return {'seed': self.seed, 'seen': seen * self.processes}

    def __iter__(self) -> Iterator[Sample]:
        epoch = getattr(self.sampler, 'epoch', 0)
        first = self.start.seen if epoch == self.start.epoch else 0
        end = None
        if self.total_iter is not None:
            left = max(0, self.total_iter - self._iterations_before(epoch))
            end = first + min(left, self._iterations(epoch)) * self.batch_size
        for number, index in itertools.islice(enumerate(self.sampler), first, end):
            yield Sample(index, (self.seed, epoch, number * self.processes + self.rank))

    def __len__(self) -> int:
        return len(self.sampler)

    def _place(self, state: Mapping[str, Any]) -> Place:
        iteration, epoch = state['iter'], state['epoch']
        recorded = recorded_of(state, 'samples', int)
        if 'seen' in recorded:
            seen = recorded['seen'] // self.processes
        else:  # of BasicSR, which began each epoch at its first sample
            seen = (iteration - epoch * (len(self) // self.batch_size)) * self.batch_size
        return Place(iteration, epoch, min(max(0, seen), len(self)))

    def _iterations(self, epoch: int) -> int:
        """How many whole batches an epoch has left."""
        return (len(self) - (self.start.seen if epoch == self.start.epoch else 0)) // self.batch_size

    def _iterations_before(self, epoch: int) -> int:
        """How many iterations the run has done when it comes to an epoch."""
        if epoch == self.start.epoch:
            return self.start.iteration
        between = (epoch - self.start.epoch - 1) * self._iterations(epoch)
        return self.start.iteration + self._iterations(self.start.epoch) + between


def recorded_of(state: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """What a training state of this package records under that name, of that kind; of BasicSR's own nothing."""
    own = state.get(KEY)
    values = own.get(name) if isinstance(own, Mapping) else None
    return (
        {key: value for key, value in values.items() if isinstance(value, kind)} if isinstance(values, Mapping) else {}
    )


def stream_of(opt: Mapping[str, Any]) -> SampleStream | None:
    """The samples of the run with these options, if this process trains it."""
    return _streams.get(opt.get('path', {}).get('training_states', ''))


class SampleError(InputError):
    """A sample of a data set that cannot be read, as a file that was there when the run began and is no more.

    torch raises an error of a worker anew in the main process, with all of the worker's traceback for its message; the
    sentence alone is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().rpartition(f'{type(self).__name__}: ')[2])


class NamedDataset(Dataset):
    """A data set that names the sample that it cannot read; in all else the data set that it is given.

    Raises:
        SampleError: Instead of what a data set of BasicSR or of this package raises for files and their sizes, and of
            InputError and OSError of any other.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except (InputError, OSError, ValueError) as error:
            is_own = type(self.dataset).__module__.startswith(('basicsr.', 'lora_sr.'))
            if not is_own and not isinstance(error, (InputError, OSError)):  # of somebody else's code
                raise
            reason = error if isinstance(error, OSError) else ' '.join(map(str, error.args))
            raise SampleError(f'{self._name(index)} cannot be read: {reason}') from error

    def _name(self, index: Any) -> str:
        """What a sample is called in the data set, as far as it says."""
        paths = getattr(self.dataset, 'paths', None)
        path = paths[index] if isinstance(paths, list) and len(paths) == len(self) else f'sample {index}'
        return str(path.get('gt_path', path) if isinstance(path, dict) else path)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset' or name.startswith('__'):  # while it is unpickled there is none yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SeededDataset(NamedDataset):
    """A data set that reads each :class:`Sample` with random numbers of its own, in whatever process, after any other.

    BasicSR seeds the workers, so that a sample depends on how many there are and on what each has read before; and it
    seeds them alike in each epoch.
    """

    def __getitem__(self, sample: Any) -> Any:
        if not isinstance(sample, Sample):
            return super().__getitem__(sample)
        with _unnoticed():
            return self._read(sample)

    def __getitems__(self, samples: list[Any]) -> list[Any]:
        """What a loader asks for to make a batch: to put the states of all generators aside takes longer than to cut a
        patch, and is done once for all of them.
        """
        with _unnoticed():
            return [
                self._read(sample) if isinstance(sample, Sample) else super(SeededDataset, self).__getitem__(sample)
                for sample in samples
            ]

    def _read(self, sample: Sample) -> Any:
        torch.default_generator.manual_seed(_seed_host(sample.seed))
        return super().__getitem__(sample.index)


def seed_process(*numbers: int) -> None:
    """Seed what a training step draws from (Python, numpy, torch on all devices) with a few whole numbers."""
    torch.manual_seed(_seed_host(numbers))


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Seed generators and draw from them; the training that goes on in the same process does not notice."""
    if get_worker_info() is not None:  # a process that does nothing else
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_host(numbers: tuple[int, ...]) -> int:
    """Seed Python and numpy, and return a seed for torch."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    np.random.seed(words)
    random.seed(words.tobytes())
    return int(words[0]) << 31 | int(words[1]) >> 1
