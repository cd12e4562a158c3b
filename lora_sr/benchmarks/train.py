"""Training key by key beside stock BasicSR, in one run: speed, memory, and whether the losses are the same."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_sr.archs.complexity import count_flops
from lora_sr.archs.reparam import deploy_form
from lora_sr.benchmarks.runtime import measure_rate
from lora_sr.benchmarks.training_process import PEFT, READY, Started, Task, serve
from lora_sr.data.prepare import prepare_databases
from lora_sr.data.sources import find_sources, read_image
from lora_sr.errors import InputError, import_basicsr
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.images.png import encode_png
from lora_sr.runtime.synthetic import synthetic_image

SCALE = 4
SUB_IMAGE, MADE_IMAGE = 480, 960  # sides, in pixels, of BasicSR's sub-images, and of images that are made
BATCHES = 4  # which come again and again where the loader is not measured
ROUNDS = 3
# Seconds of a turn, and steps before the first, of which the losses are compared. Three warm a graph up.
TURN = {'cuda': 0.3, 'cpu': 1.0}
STEPS = {'cuda': 10, 'cpu': 4}
BATCH, PATCH = {'cuda': 16, 'cpu': 4}, {'cuda': 64, 'cpu': 48}
GPU_ALONE = {'AdaptSR-SwinIR'}  # what takes many seconds a step on a CPU, and is measured there where it is asked for
MOST_WORKERS = 8
MEMORY_SHARE = 0.7  # of what is free on a GPU, for first steps at the same time
STOCK = 'stock BasicSR'

# What each key is set to; the first ones stay when the next is added, the others are measured by themselves.
ADDED: dict[str, Any] = {'memory_format': 'channels_last', 'amp': 'bf16', 'compile': True, 'graph': True}
ALONE: dict[str, Any] = {'clip_grad_norm': 1e3, 'tf32': True, 'checkpointing': True, 'accumulate_iter': 2}
KEYS = {**ADDED, **ALONE}
DEFAULT_KEYS = {'cuda': ['memory_format', 'amp', 'graph', 'checkpointing'], 'cpu': ['memory_format', 'amp']}
# By how much a loss may differ from stock BasicSR's, as a part of it: rounding grows with each step, and a GPU's
# convolutions round to TF32.
TOLERANCE, TOLERANCE_OF_AMP = 2e-3, 2e-2

SWINIR = dict(type='SwinIR', upscale=SCALE, window_size=8, img_range=1.0, mlp_ratio=2, drop_path_rate=0)
LIGHT = dict(depths=[6] * 4, embed_dim=60, num_heads=[6] * 4, upsampler='pixelshuffledirect')
CLASSICAL = dict(depths=[6] * 6, embed_dim=180, num_heads=[6] * 6, upsampler='pixelshuffle')


@dataclass(frozen=True)
class Subject:
    """A network that is trained, as the shipped option files train it.

    Args:
        network: The section ``network_g``.
        model: The ``model_type``.
        rate: The learning rate of Adam.
        teacher: The section ``network_t``; None for no teacher.
        rival: The same network by another library's LoRA; None where there is none.
    """

    network: Mapping[str, Any]
    model: str = 'SRModel'
    rate: float = 2e-4
    teacher: Mapping[str, Any] | None = None
    rival: Mapping[str, Any] | None = None


_LORA = {'groups': ['all'], 'rank': 8, 'alpha': 2}
_ADAPTED = {'base': {**SWINIR, **CLASSICAL}, 'lora': _LORA}
SUBJECTS = {
    'SPAN': Subject({'type': 'SPAN', 'feature_channels': 26, 'upscale': SCALE}, rate=5e-4),
    'DSCLoRA-LKDN': Subject(
        {'type': 'DSCLoRA', 'feature_channels': 26, 'upscale': SCALE, 'rank': 32, 'alpha': 32},
        'DistillationModel',
        1e-3,
        {'type': 'LKDN', 'upscale': SCALE},
    ),
    'LKDN': Subject({'type': 'LKDN', 'upscale': SCALE}),
    'SwinIR-light': Subject({**SWINIR, **LIGHT}, 'SwinIRModel'),
    'AdaptSR-SwinIR': Subject({'type': 'AdaptSR', **_ADAPTED}, 'SwinIRModel', 2e-3, rival={'type': PEFT, **_ADAPTED}),
}


@dataclass(frozen=True, eq=False)
class Form:
    """A way to train.

    Args:
        name: As the table shows it.
        train: Keys of ``train`` that are set.
        is_stock: Whether BasicSR is left as it is.
        is_rival: Whether the network is another one, of which the losses are no matter.
        is_taught: Whether the teacher's outputs are computed beforehand.
        loads: The kind of database that its loader reads; None where its loader is not measured.
    """

    name: str
    train: Mapping[str, Any] = field(default_factory=dict)
    is_stock: bool = False
    is_rival: bool = False
    is_taught: bool = False
    loads: str | None = None

    @property
    def tolerance(self) -> float:
        return TOLERANCE_OF_AMP if 'amp' in self.train else TOLERANCE


@dataclass
class Row:
    """What has been measured of a form: seconds of each turn, bytes at the peak, and what it said when it started."""

    started: Started
    steps: list[float] = field(default_factory=list)
    loops: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    memory: int = 0


@dataclass(frozen=True)
class Conditions:
    """What all forms have in common.

    Args:
        device: ``cpu`` or ``cuda``.
        batch: Samples of a batch.
        patch: Side of the LR patches.
        steps: Steps after which losses are compared.
        keys: Keys of ``train`` that are measured.
        workers: Worker processes of a loader.
        rates: Operations a second of a product of matrices, by dtype.
        folder: Where batches and databases are.
    """

    device: str
    batch: int
    patch: int
    steps: int
    keys: Sequence[str]
    workers: int
    rates: Mapping[torch.dtype, float]
    folder: Path


def run(
    images: Sequence[str | os.PathLike[str]] = (),
    networks: Sequence[str] = (),
    keys: Sequence[str] | None = None,
    batch: int | None = None,
    patch: int | None = None,
    steps: int | None = None,
    device: str | None = None,
) -> None:
    """Print a table for each network: stock BasicSR, ours, and ours with one key more in each row.

    Each form trains in a process of its own, and they take turns. The last rows take their batches from a loader.

    Args:
        images: Folders of images of at least 480 x 480 pixels; images of soft structures are made if there are none.
        networks: Names in :data:`SUBJECTS`; all if none are given, on a CPU but for :data:`GPU_ALONE`.
        keys: Keys of ``train``, in :data:`KEYS`; by default those that are ready at once on the device.
        batch: Samples of a batch.
        patch: Side of the LR patches.
        steps: Steps after which losses are compared.
        device: ``cpu`` or ``cuda``; by default a GPU where there is one.

    Raises:
        InputError: BasicSR is not installed, or a value is beyond its range.
        RuntimeError: A loss is another than stock BasicSR's, or a form failed. All tables are printed before.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        raise InputError('--device must be cpu where there is no GPU, got cuda.')
    for name, value in (('--batch', batch), ('--patch', patch), ('--iterations', steps)):
        if value is not None and value < 1:
            raise InputError(f'{name} must be a whole number of at least 1, got {value}.')
    patch = patch or PATCH[device]
    if patch * SCALE > SUB_IMAGE or patch % 8:
        raise InputError(f'--patch must be a multiple of 8 up to {SUB_IMAGE // SCALE}, got {patch}.')
    import_basicsr('lora-sr bench train')
    with tempfile.TemporaryDirectory(prefix='train_benchmark_') as folder:
        conditions = Conditions(
            device,
            batch or BATCH[device],
            patch,
            steps or STEPS[device],
            DEFAULT_KEYS[device] if keys is None else keys,
            min(MOST_WORKERS, os.cpu_count() or 1),
            {dtype: measure_rate(torch.device(device), dtype) for dtype in (torch.float32, torch.bfloat16)},
            Path(folder),
        )
        _prepare(images, conditions)
        _print_head(conditions)
        faults = []
        for name in networks or [name for name in SUBJECTS if device == 'cuda' or name not in GPU_ALONE]:
            rows = measure(SUBJECTS[name], conditions)
            _print(name, SUBJECTS[name], conditions, rows)
            faults += [f'{name}, {fault}' for fault in _faults(rows)]
    if faults:
        raise RuntimeError('; '.join(faults))


def forms_of(subject: Subject, keys: Sequence[str]) -> list[Form]:
    """The rows of a network's table, in their order."""
    forms = [Form(STOCK, is_stock=True, loads='png'), Form('lora_sr')]
    for key in (key for key in ADDED if key in keys):
        forms.append(Form(f'+ {_text(key)}', {**forms[-1].train, key: ADDED[key]}))
    best = forms[-1]
    if subject.teacher is not None:
        best = replace(best, name='+ network_t.precompute', is_taught=True)
        forms.append(best)
    forms[-1] = replace(best, loads='raw')
    recorded = {key: value for key, value in best.train.items() if key != 'graph'}
    for key in (key for key in ALONE if key in keys):
        forms.append(Form(f'  beside, without graph: {_text(key)}', {**recorded, key: ALONE[key]}))
    if subject.rival is not None and find_spec('peft') is not None:
        forms.append(Form("stock BasicSR with PEFT's LoRA", is_stock=True, is_rival=True))
    return forms


def measure(subject: Subject, conditions: Conditions) -> dict[Form, Row | str]:
    """Train a network in all its forms, in turn.

    Returns:
        For each form what was measured, or a sentence that says why it failed.
    """
    forms = forms_of(subject, conditions.keys)
    turn = TURN[conditions.device]
    with _processes(subject, forms, conditions) as processes:
        rows: dict[Form, Row | str] = {
            form: started if isinstance(started, str) else Row(started)
            for form, started in ((form, process.started) for form, process in processes.items())
        }

        def ask(form: Form, method: str) -> float | None:
            row = rows[form]
            if isinstance(row, str):
                return None
            answer = processes[form].ask(method, turn)
            if isinstance(answer, str):
                rows[form] = answer
                return None
            return answer

        for form in forms:
            memory = ask(form, 'memory')
            if memory is not None:
                rows[form].memory = int(memory)  # type: ignore[union-attr]
        for _ in range(ROUNDS):
            for method, wanted in (('step', forms), *((name, [one for one in forms if one.loads]) for name in LOADED)):
                for form in wanted:
                    seconds = ask(form, method)
                    if seconds is not None:
                        getattr(rows[form], f'{method}s').append(seconds)
    return rows


LOADED = ('loop', 'load')


class _Process:
    """A process that trains, seen from here."""

    def __init__(self, context: Any, task: Task):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, task))
        self.process.start()
        theirs.close()
        self.started: Started | str = ''

    def begin(self) -> bool:
        """Let it do its first steps, if it could be made ready."""
        answer = self._answer()
        if answer == READY:
            self.connection.send(None)
            return True
        self.started = answer
        return False

    def wait(self) -> None:
        """Until its first steps are done."""
        self.started = self._answer()

    def ask(self, method: str, seconds: float) -> Any:
        """What a method of its trainer gives, or a sentence that says why nothing."""
        self.connection.send((method, seconds))
        return self._answer()

    def end(self) -> None:
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return f'the process ended with status {self.process.exitcode}'


@contextmanager
def _processes(subject: Subject, forms: Sequence[Form], conditions: Conditions) -> Iterator[dict[Form, _Process]]:
    """A process for each form, which has done its first steps.

    On a CPU they do these one after the other; on a GPU, after the first, as many at a time as the memory takes.
    """
    if 'forkserver' in multiprocessing.get_all_start_methods():  # which imports torch once for all
        context: Any = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['torch', 'torchvision', 'cv2', 'scipy.ndimage'])
    else:
        context = multiprocessing.get_context('spawn')
    processes: dict[Form, _Process] = {}
    try:
        for form in forms:
            processes[form] = _Process(context, task_of(subject, form, conditions))
        first, *others = processes.values()
        if first.begin():
            first.wait()
        _start(others, _at_a_time(first.started))
        yield processes
    finally:
        for process in processes.values():
            process.end()


def _start(processes: list[_Process], at_a_time: int) -> None:
    """Let processes do their first steps."""
    running: list[_Process] = []
    while processes or running:
        while processes and len(running) < at_a_time:
            if processes[0].begin():
                running.append(processes[0])
            processes = processes[1:]
        ready = wait([process.connection for process in running]) if running else []
        for process in [process for process in running if process.connection in ready]:
            process.wait()
            running.remove(process)


def _at_a_time(started: Started | str) -> int:
    """How many processes a GPU's memory takes at a time, each like one that has started; one on a CPU."""
    if isinstance(started, str) or not started.held:
        return 1
    return max(1, int(MEMORY_SHARE * torch.cuda.mem_get_info()[0] / started.held))


def task_of(subject: Subject, form: Form, conditions: Conditions) -> Task:
    """What the process of a form trains: the options of a shipped file, as far as the step and the loader go."""
    network = _sized(subject.rival if form.is_rival and subject.rival else subject.network, conditions.patch)
    section = _section(form.loads or 'png', conditions)
    opt: dict[str, Any] = {
        'name': 'benchmark',
        'model_type': subject.model,
        'scale': SCALE,
        'num_gpu': int(conditions.device == 'cuda'),
        'is_train': True,
        'dist': False,
        'rank': 0,
        'world_size': 1,
        'path': {'models': str(conditions.folder), 'pretrain_network_g': None},
        'datasets': {'train': section},
        'network_g': network,
        'train': {
            'ema_decay': 0.999,
            'optim_g': {'type': 'Adam', 'lr': subject.rate, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [10**9]},
            'total_iter': 10**9,
            'pixel_opt' if subject.teacher is None else 'distill_pixel_opt': {'type': 'L1Loss'},
            **form.train,
        },
    }
    if subject.teacher is not None:
        opt['network_t'] = dict(subject.teacher)
        opt['path']['pretrain_network_t'] = str(_teacher_file(subject, conditions.folder))
    return Task(
        opt,
        conditions.folder / 'batches.pth',
        conditions.steps,
        form.is_stock,
        section if form.loads else None,
        form.is_taught,
    )


def _sized(section: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """A section of a network; SwinIR is made for patches of that size, as in its recipes."""
    section = {key: _sized(value, patch) if isinstance(value, Mapping) else value for key, value in section.items()}
    return {**section, 'img_size': patch} if section.get('type') == 'SwinIR' else section


def _teacher_file(subject: Subject, folder: Path) -> Path:
    """The random weights of a teacher, made when they are asked for first."""
    from lora_sr.archs.registry import find_arch

    section = dict(subject.teacher or {})
    file = folder / f'{section["type"]}.pth'
    if not file.exists():
        arch: Any = find_arch(section.pop('type'))
        torch.manual_seed(1)
        torch.save(arch(**section).state_dict(), file)
    return file


def _prepare(images: Sequence[str | os.PathLike[str]], conditions: Conditions) -> None:
    """Write the databases that the loaders read, and the batches that the steps do."""
    folder = conditions.folder
    if not images:
        (folder / 'images').mkdir()
        for number in range(4):
            picture = synthetic_image(1, 3, MADE_IMAGE + SUB_IMAGE * number // 2, MADE_IMAGE)[0]
            picture += torch.rand(picture.shape, generator=torch.Generator().manual_seed(number)) / 32  # as a camera's
            pixels = (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            (folder / 'images' / f'{number}.png').write_bytes(encode_png(np.ascontiguousarray(pixels)).tobytes())
        images = [folder / 'images']
    files = [source.hr for source in find_sources([Path(image) for image in images], ())]
    generator = np.random.default_rng(0)
    side, samples = conditions.patch * SCALE, []
    for number in range(BATCHES * conditions.batch):
        image = read_image(files[number % len(files)])
        if min(image.shape[:2]) < SUB_IMAGE:
            raise InputError(
                f'The images must have {SUB_IMAGE} x {SUB_IMAGE} pixels, as sub-images have, got {image.shape[1]} x '
                f'{image.shape[0]} in {files[number % len(files)]}.'
            )
        top, left = (generator.integers(0, length - side + 1) for length in image.shape[:2])
        hr = np.ascontiguousarray(image[top : top + side, left : left + side, :3])
        samples.append((_planes(bicubic_downscale(hr, SCALE)), _planes(hr)))
    batches = [
        dict(zip(('lq', 'gt'), map(torch.stack, zip(*samples[start : start + conditions.batch]))))
        for start in range(0, len(samples), conditions.batch)
    ]
    torch.save(batches, folder / 'batches.pth')
    prepare_databases(images, folder / 'png', [SCALE], size=SUB_IMAGE, step=SUB_IMAGE // 2, progress=False)
    prepare_databases(images, folder / 'raw', [SCALE], raw=True, progress=False)


def _planes(image: np.ndarray) -> Tensor:
    """BGR of 8 bits, (H, W, 3) -> RGB in [0, 1], (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))).float() / 255


def _section(kind: str, conditions: Conditions) -> dict[str, Any]:
    """The section ``datasets.train`` of a loader."""
    end = 'sub' if kind == 'png' else 'raw'
    folder = conditions.folder / kind
    return {
        'name': 'benchmark',
        'type': 'PairedImageDataset' if kind == 'png' else 'RawPairedImageDataset',
        'phase': 'train',
        'scale': SCALE,
        'dataroot_gt': str(folder / f'HR_{end}.lmdb'),
        'dataroot_lq': str(folder / f'LR_bicubic_X{SCALE}_{end}.lmdb'),
        'io_backend': {'type': 'lmdb'},
        'gt_size': conditions.patch * SCALE,
        'use_hflip': True,
        'use_rot': True,
        'batch_size_per_gpu': conditions.batch,
        'num_worker_per_gpu': conditions.workers,
        **({'prefetch_mode': 'cuda', 'pin_memory': True} if kind == 'raw' and conditions.device == 'cuda' else {}),
    }


def floor_of(subject: Subject, conditions: Conditions) -> float:
    """Floating-point operations of a step: forward, and twice as much backward, of the folded network; no teacher."""
    from lora_sr.archs.registry import find_arch

    section = _sized(subject.network, conditions.patch)
    arch: Any = find_arch(section.pop('type'))
    network = deploy_form(arch(**section))
    return 3.0 * 2 * count_flops(network, conditions.patch, conditions.patch) * conditions.batch


def _print_head(conditions: Conditions) -> None:
    where = torch.cuda.get_device_name() if conditions.device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    rates = ', '.join(
        f'{rate / 1e12:.2f} TFLOP/s in {str(dtype).rpartition(".")[2]}' for dtype, rate in conditions.rates.items()
    )
    print(f'{where}, torch {torch.__version__}; measured: {rates}')
    print(f'batches of {conditions.batch}, LR patches of {conditions.patch} x {conditions.patch}, x{SCALE}', flush=True)


def _print(name: str, subject: Subject, conditions: Conditions, rows: Mapping[Form, Row | str]) -> None:
    print(f'\n{name}')
    print(f'{"":38}{"iterations/s":>13}{"samples/s":>11}{"ratio":>7}{"memory":>11}{f"loss {conditions.steps}":>12}')
    first = next(iter(rows.values()))
    for form, row in rows.items():
        if isinstance(row, str):
            print(f'{form.name:38}  {row}')
            continue
        ratio = math.nan if isinstance(first, str) else _median(first.steps) / _median(row.steps)
        memory = f'{row.memory / 1e6:,.0f} MB' if row.memory else '-'
        print(f'{form.name:38}{_speeds(row.steps, conditions)}{ratio:>7.2f}{memory:>11}{row.started.loss:>12.6f}')
        for warning in row.started.warnings:
            print(f'    {warning}')
    operations = floor_of(subject, conditions)
    for dtype, rate in conditions.rates.items():
        seconds = operations / rate
        kind = str(dtype).rpartition('.')[2]
        print(f'{f"floor, {kind}":38}{_speeds([seconds], conditions)}  {operations / 1e9:,.1f} GFLOP a step')
    loaded = [(form, row) for form, row in rows.items() if isinstance(row, Row) and row.loops]
    if loaded:
        print(f'{f"with a loader of {conditions.workers} workers":38}{"":31}{"loader alone":>23}')
    for form, row in loaded:
        label = f'{STOCK if form.is_stock else "lora_sr, all that is above"}, {form.loads}'
        ratio = _median(loaded[0][1].loops) / _median(row.loops)
        loader = conditions.batch / _median(row.loads)
        print(f'{label:38}{_speeds(row.loops, conditions)}{ratio:>7.2f}{loader:>13,.0f} samples/s')
    sys.stdout.flush()


def _speeds(seconds: Sequence[float], conditions: Conditions) -> str:
    iterations = 1 / _median(seconds)
    return f'{iterations:>13.2f}{iterations * conditions.batch:>11.1f}'


def _faults(rows: Mapping[Form, Row | str]) -> list[str]:
    """What is wrong with the rows of a table."""
    faults = [f'{form.name.strip()}: {row}' for form, row in rows.items() if isinstance(row, str)]
    first = next(iter(rows.values()))
    for form, row in rows.items():
        if isinstance(row, Row) and isinstance(first, Row) and not form.is_rival:
            difference = abs(row.started.loss / first.started.loss - 1)
            if not difference <= form.tolerance:
                faults.append(f'{form.name.strip()}: the loss differs by {difference:.1e} of that of {STOCK}')
    return faults


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _text(key: str) -> str:
    value = KEYS[key]
    return f'{key}: {str(value).lower() if isinstance(value, bool) else value}'
