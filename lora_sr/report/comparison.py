"""Networks side by side on sets of images: PSNR, SSIM, what they cost, and a picture."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Callable, TypeVar

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lora_sr import figures
from lora_sr.adapters import count_parameters
from lora_sr.archs import deploy_form, network_info, take_any_size
from lora_sr.archs.complexity import (
    CHALLENGE_SIDE,
    count_activations,
    count_convolutions,
    count_flops,
    count_multi_adds_720p,
)
from lora_sr.archs.info import refusal
from lora_sr.checkpoints import NetworkLike, OpenedNetwork, open_network
from lora_sr.checkpoints.origin import fingerprint
from lora_sr.data.sources import (
    IMAGE_SUFFIXES,
    Source,
    check_left_out,
    find_sources,
    name_images,
    read_image,
    state_of,
)
from lora_sr.errors import InputError, printable
from lora_sr.files import check_output, identity, replacing_together, was_interrupted, write_errors
from lora_sr.images.bicubic import bicubic_downscale, bicubic_upscale
from lora_sr.report.cost import measure_peak_memory, measure_runtimes, ntire_score
from lora_sr.report.fidelity import WINDOW, Fidelity, mean_fidelity, measure_fidelity
from lora_sr.report.plot import encode_plot
from lora_sr.report.tables import TABLE_SUFFIXES, Comparison, Cost, Row, encode_table
from lora_sr.runtime.deployed import optimize
from lora_sr.runtime.pixels import image_to_tensor, tensor_to_image
from lora_sr.runtime.upscaler import use_own_gpu
from lora_sr.share import NotLastError, Parts, Share, pieces_of

Item = TypeVar('Item')
Result = TypeVar('Result')

BICUBIC, ORIGINAL = 'bicubic', 'original'
PART_FILE = 'part.json'  # what a process has measured that shares the images
PATCH, ZOOM = 64, 3  # the picture shows patches of 64x64 pixels, each pixel 3x3
READ_AHEAD = 2  # images that are read while the networks run
WORKERS = min(8, os.cpu_count() or 1)


@dataclass
class _Contestant:
    """A network in deploy form, its scale, and whether it has weights or only costs."""

    network: nn.Module
    scale: int
    has_weights: bool


@dataclass(frozen=True)
class _Versions:
    """An original and what the methods make of its LR image, uint8 of shape (H, W, 3), BGR."""

    original: np.ndarray
    versions: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    """What was measured of bicubic and each network on images of a set, one by one, and the strips of the picture."""

    measures: list[dict[str, Fidelity]]
    strips: list[np.ndarray]

    def write(self, folder: Path, left_out: list[str]) -> None:
        """Write it for :meth:`add`, with the reasons why other images are left out."""
        for number, strip in enumerate(self.strips):
            (folder / f'{number}.png').write_bytes(cv2.imencode('.png', strip)[1].tobytes())
        measures = [{name: astuple(one) for name, one in of_image.items()} for of_image in self.measures]
        (folder / PART_FILE).write_text(json.dumps({'measures': measures, 'left_out': left_out}), 'utf-8')

    def add(self, folder: Path) -> list[str]:
        """Add what has been written, and return the reasons."""
        part = json.loads((folder / PART_FILE).read_text('utf-8'))
        for of_image in part['measures']:
            self.measures.append({name: Fidelity(*values) for name, values in of_image.items()})
        for number in range(len(part['measures'])):
            if (folder / f'{number}.png').exists():
                self.strips.append(read_image(folder / f'{number}.png'))
        reasons: list[str] = part['left_out']
        return reasons


def compare(
    networks: Mapping[str, NetworkLike | OpenedNetwork],
    sets: dict[str, tuple[str | os.PathLike, str | os.PathLike | None]] | None = None,
    rgb: bool = False,
    runtime: bool = False,
    baseline: str | None = None,
    size: tuple[int, int] | None = None,
    outputs: list[str | os.PathLike] | None = None,
    plot: str | os.PathLike | None = None,
    picture: str | os.PathLike | None = None,
    overwrite: bool = False,
    skip_broken: bool = False,
    on_table: Callable[[Comparison], None] | None = None,
    share: Share | None = None,
) -> Comparison:
    """Measure networks, and bicubic interpolation beside them, on sets of images.

    All networks are measured in deploy form: with LoRA merged and branches folded. PSNR and SSIM are those of the
    field's tables: of 8-bit outputs, ``scale`` pixels of border left out, equal to BasicSR's metrics, and means over
    the images of a set. The networks run on a GPU where there is one. Images are read and measured by other threads
    while the networks run.

    Args:
        networks: Name -> whatever :func:`lora_sr.load_network` takes, or a network that has been opened. An option file
            that names no weights is measured for its costs alone.
        sets: Name -> folder of the original images, and that of the LR images of the same names (or with ``x{scale}``
            behind); with ``None`` they are made as the published ones were, see
            :func:`lora_sr.data.bicubic_downscale`. Without any set costs alone are given.
        rgb: Measure PSNR and SSIM on RGB too, beside those on Y.
        runtime: Measure runtime and peak memory as well, which takes its time.
        baseline: Name of the network that the NTIRE score is relative to; measures the runtime too.
        size: Height and width of the input for runtime and memory, by default 256x256 as in the challenge.
        outputs: Files to write the table to, ``.md``, ``.csv`` or ``.json``.
        plot: A picture to write: PSNR over multiply-adds. Needs matplotlib.
        picture: A PNG file to write: for every image a detail, in all versions beside the original.
        overwrite: Replace files that exist.
        skip_broken: Leave out images that are damaged, too small or without a partner; the name of a set says how many
            are left. Without it all of them are named and nothing is measured.
        on_table: Called with what is returned before any file is written, so that no failure to write loses it.
        share: Measure on this process's images only, see :mod:`lora_sr.share`, and write the files if it is the last
            one. What is measured is kept beside the first of ``outputs`` until then.

    Returns:
        A row for bicubic, where there are sets, and one for each network, in their order.

    Raises:
        InputError: A folder, an image or a network that cannot be used, networks of different scales or not of the
            scale of a set, a network that gives values that are not finite, or a file that cannot be written. All that
            can be told beforehand is told before any run.
        NotLastError: The share is done, and it is another process that has written, or will write, the files.
    """
    sets = sets or {}
    runtime = runtime or baseline is not None
    _check_request(networks, sets, rgb, runtime, baseline, size, plot, picture)
    files = [(picture, ('.png',)), (plot, figures.SUFFIXES), *((path, TABLE_SUFFIXES) for path in outputs or ())]
    written = {Path(path): suffixes for path, suffixes in files if path is not None}
    if share is not None:
        _check_share(sets, runtime, outputs)
    # A killed run is made up for by the same files, but times are never the same.
    may_exist = overwrite or share is not None or (not runtime and was_interrupted(list(written)))
    for path, suffixes in written.items():
        check_output(path, suffixes, may_exist)
    _check_distinct([path for path, _ in files if path is not None])
    contestants = {name: _read_contestant(name, file) for name, file in networks.items()}
    if plot is not None and not any(one.has_weights for one in contestants.values()):
        raise InputError(f'There is nothing to draw in {plot}: no network has weights.')
    scale = _common_scale(contestants)
    found = {name: _find_set(name, gt, lr, scale) for name, (gt, lr) in sets.items()}
    sources = {name: of_set for name, (of_set, _) in found.items()}
    left_out = {name: lonely for name, (_, lonely) in found.items()}
    if share is None:  # else they are decoded when it is their turn
        for name, of_set in sources.items():
            sources[name], misfits = _usable(name, of_set, scale)
            left_out[name] += misfits
    _check_left_out(sources, left_out, skip_broken)
    _check_inputs(
        list(written), [path for of_set in sources.values() for one in of_set for path in (one.hr, *one.lr.values())]
    )

    if share is not None:
        use_own_gpu(share)
    costs = {name: _count_costs(one.network, scale) for name, one in contestants.items()}
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    runners = {name: one.network.to(device) for name, one in contestants.items() if one.has_weights}

    def measure(name: str, usable: list[Source]) -> _Measured:
        return _measure_set(name, usable, runners, scale, rgb, picture is not None)

    def conclude(measured: dict[str, _Measured]) -> Comparison:
        """Make the table of what was measured, and write the files."""
        quality: dict[str, dict[str, Fidelity]] = {name: {} for name in (BICUBIC, *networks)}
        for name, of_set in measured.items():
            # In whatever form the table is kept, it says so.
            usable, total = len(of_set.measures), len(of_set.measures) + len(left_out[name])
            set_name = f'{name} ({usable} of {total})' if left_out[name] else name
            for key in (BICUBIC, *runners):
                quality[key][set_name] = mean_fidelity([measures[key] for measures in of_set.measures])
        final_costs, conditions = costs, None
        if runtime:
            height, width = size or (CHALLENGE_SIDE, CHALLENGE_SIDE)
            final_costs, conditions = _measure_costs(costs, contestants, height, width, device)
        if baseline is not None:
            final_costs = _score(final_costs, baseline)
        rows = [Row(BICUBIC, None, quality[BICUBIC])] if sets else []
        rows += [Row(name, final_costs[name], quality[name]) for name in networks]
        reasons = [reason for of_set in left_out.values() for reason in of_set]
        total = len(reasons) + sum(len(of_set.measures) for of_set in measured.values())
        note = name_images(reasons, total, 'left out') if reasons else None
        comparison = Comparison(rows, scale, baseline, conditions, note)
        left = None
        if on_table is not None:
            try:
                on_table(comparison)
            except BrokenPipeError as error:  # whoever read the table has seen enough; the files are another matter
                left = error
        contents = {Path(path): encode_table(comparison, Path(path).suffix) for path in outputs or ()}
        if plot is not None:
            contents[Path(plot)] = encode_plot(comparison, Path(plot).suffix)
        if picture is not None:
            strips = [strip for of_set in measured.values() for strip in of_set.strips]
            contents[Path(picture)] = cv2.imencode('.png', np.concatenate(strips))[1].tobytes()
        with replacing_together(list(contents), overwrite) as partials:
            for (path, content), partial in zip(contents.items(), partials):
                with write_errors(path):
                    partial.write_bytes(content)
        if left is not None:
            raise left
        return comparison

    first = Path(outputs[0]) if outputs else None
    if share is None:
        if first is not None:
            with write_errors(first):
                Parts(_parts_folder(first), [], '').clear()
        return conclude({name: measure(name, of_set) for name, of_set in sources.items()})
    pieces = [(name, piece) for name, of_set in sources.items() for piece in pieces_of(of_set)]
    assert first is not None  # as has been checked
    job = [(name, repr(one.network), fingerprint(one.network.state_dict())) for name, one in contestants.items()]
    key = repr((job, sorted(runners), scale, rgb, picture is not None))
    words = [f'{key} {name} {state_of(piece)}' for name, piece in pieces]
    parts = Parts(_parts_folder(first), words, repr(skip_broken))
    if parts.record() is not None and not all(path.exists() for path in written):
        parts.forget()
    if parts.record() is None and not parts.made:
        for path, suffixes in written.items():
            check_output(path, suffixes, overwrite)
    for number in share.of(range(len(pieces))) if parts.record() is None else ():
        if not parts.paths[number].is_dir():
            name, piece = pieces[number]
            of_piece, misfits = _usable(name, piece, scale)
            measured_piece = measure(name, of_piece)
            with write_errors(first), parts.make(number) as folder:
                measured_piece.write(folder, misfits)
    with parts.joining():
        is_late = parts.record() is not None
        if not is_late:
            measured: dict[str, _Measured] = {name: _Measured([], []) for name in sets}
            for (name, _), path in zip(pieces, parts.paths):
                left_out[name] += measured[name].add(path)
            _check_left_out({name: of_set.measures for name, of_set in measured.items()}, left_out, skip_broken)
            comparison = conclude(measured)
            parts.mark_joined({})
    if is_late:
        raise NotLastError
    return comparison


@torch.inference_mode()
def super_resolve(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Run a network on one image, where the network is.

    Args:
        network: RGB in [0, 1], (1, 3, H, W) -> (1, 3, scale * H, scale * W).
        image: uint8 of shape (H, W, 3), BGR.

    Returns:
        uint8 of shape (scale * H, scale * W, 3), BGR.

    Raises:
        InputError: It gives values that are not finite.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device('cpu'))
    lr = image_to_tensor(image).to(device)
    # TF32 would cost the last digits of PSNR.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        output = network.eval()(lr.contiguous(memory_format=torch.channels_last))
    if not output.isfinite().all():  # 8 bits would hide it
        raise InputError('The network gives values that are not finite: it has weights that are NaN or too large.')
    return tensor_to_image(output)


def _check_request(
    networks: Mapping[str, NetworkLike | OpenedNetwork],
    sets: Mapping[str, tuple[str | os.PathLike, str | os.PathLike | None]],
    rgb: bool,
    runtime: bool,
    baseline: str | None,
    size: tuple[int, int] | None,
    plot: str | os.PathLike | None,
    picture: str | os.PathLike | None,
) -> None:
    for name in (*networks, *sets):
        if not name.isprintable():
            raise InputError(f'Names must be printable, got "{printable(name)}".')
    for name in (BICUBIC, ORIGINAL):
        if name in networks:
            raise InputError(f'"{name}" is the name of another row or picture: give the network another name.')
    if baseline is not None and baseline not in networks:
        raise InputError(f'The baseline "{baseline}" is none of the networks, which are {", ".join(networks)}.')
    if size is not None and not runtime:
        raise InputError('The size of the input is for measuring the runtime: ask for that too, with --runtime.')
    if size is not None and min(size) < 1:
        raise InputError(f'The size of the input must be at least 1x1, got {size[1]}x{size[0]} (width x height).')
    for what, wanted in (('RGB', rgb), ('plot', plot), ('picture', picture)):
        if wanted and not sets:
            raise InputError(f'{what} was asked for, but no set of images is given: name one with --set.')
    if plot is not None:
        figures.figure_class()


def _check_distinct(paths: list[str | os.PathLike]) -> None:
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(f'The output {path} is given twice: give each output its own file.')
        seen.add(real)


def _check_inputs(outputs: list[Path], inputs: list[Path]) -> None:
    known = set(map(identity, inputs))
    for path in outputs:
        if path.exists() and identity(path) in known:
            raise InputError(f'The output {path} is an image of a set: choose another output.')


def _read_contestant(name: str, source: NetworkLike | OpenedNetwork) -> _Contestant:
    """A network in deploy form that takes RGB images of any size."""
    try:
        opened = source if isinstance(source, OpenedNetwork) else open_network(source, needs_weights=False)
        network = deploy_form(opened.network)
    except InputError as error:
        raise InputError(f'"{name}": {error}') from None
    info = network_info(network)
    if info is not None and info.value_range != 1:
        raise InputError(
            f'"{name}" is a {type(network).__name__}, for values from 0 to {info.value_range}: compare measures '
            'networks for values in [0, 1].'
        )
    if info is None or info.fixed_size is not None or info.in_channels != 3:
        reason = refusal(network) if info is None else ''
        raise InputError(f'"{name}" does not take RGB images of any size{reason}: compare measures networks that do.')
    if info.out_channels != 3:
        raise InputError(f'"{name}" gives images of {info.out_channels} channels: compare measures networks of RGB.')
    has_weights = opened.checkpoint is not None or opened.section is None  # a live network has some
    return _Contestant(take_any_size(network), info.scale, has_weights)


def _common_scale(contestants: dict[str, _Contestant]) -> int:
    scales = {name: one.scale for name, one in contestants.items()}
    if len(set(scales.values())) > 1:
        listed = ', '.join(f'"{name}" x{scale}' for name, scale in scales.items())
        raise InputError(f'The networks have different scales ({listed}): compare those of one scale at a time.')
    return next(iter(scales.values()))


def _check_share(
    sets: Mapping[str, tuple[str | os.PathLike, str | os.PathLike | None]],
    runtime: bool,
    outputs: list[str | os.PathLike] | None,
) -> None:
    if runtime:
        raise InputError('--share must be left out with --runtime and --baseline: other processes would slow it down.')
    if not sets or not outputs:
        raise InputError('--share needs images, by --set, and a file for the table, by --output.')


def _parts_folder(output: Path) -> Path:
    return output.parent / f'.{output.name}.parts'


def _check_left_out(usable: Mapping[str, Sized], left_out: Mapping[str, list[str]], skip_broken: bool) -> None:
    """Refuse to go on without images that cannot be used unless that is wanted, and with none of a set."""
    for name, of_set in usable.items():
        if not len(of_set):
            reasons = left_out[name]
            raise InputError(name_images(reasons, len(reasons), f'of the set "{name}" cannot be used'))
    reasons = [reason for of_set in left_out.values() for reason in of_set]
    check_left_out(reasons, len(reasons) + sum(map(len, usable.values())), skip_broken)


def _find_set(
    name: str, gt: str | os.PathLike, lr: str | os.PathLike | None, scale: int
) -> tuple[list[Source], list[str]]:
    """The images of a set, and a sentence for each of those without a partner."""
    known: dict[str, Path] = {}
    for path in sorted(
        path for path in Path(gt).glob('[!.]*') if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ):
        other = known.setdefault(path.stem, path)
        if other != path:
            raise InputError(
                f'{other} and {path.name} of the set "{name}" have one name: rename or remove one of them.'
            )
    lonely: dict[str, str] = {}
    sources = find_sources([gt], [scale], None if lr is None else [lr], misfits=lonely)
    return sources, list(lonely.values())


def _usable(name: str, sources: Sequence[Source], scale: int) -> tuple[list[Source], list[str]]:
    """The images of a set that can be used, and why others cannot, a sentence for each."""
    with ThreadPoolExecutor(WORKERS) as pool:
        reasons = list(pool.map(lambda source: _misfit(name, source, scale), sources))
    usable = [source for source, reason in zip(sources, reasons) if reason is None]
    return usable, [reason for reason in reasons if reason is not None]


def _misfit(name: str, source: Source, scale: int) -> str | None:
    """Why an image, which is decoded for it, cannot be used; no image is missed when the networks run."""
    try:
        height, width = (length // scale for length in read_image(source.hr).shape[:2])
        there = read_image(source.lr[scale]).shape[:2] if scale in source.lr else (height, width)
    except InputError as error:
        return str(error)
    if min(height, width) * scale < 2 * scale + WINDOW:
        needed = -(-(2 * scale + WINDOW) // scale) * scale  # within the border, for SSIM
        return f'{source.hr} must have at least {needed} pixels each way, got {width * scale} x {height * scale}.'
    if there != (height, width):
        return (
            f'{source.lr[scale]} of the set "{name}" must have {width} x {height} pixels at x{scale}, the scale of the '
            f'networks, got {there[1]} x {there[0]}.'
        )
    return None


def _count_costs(network: nn.Module, scale: int) -> Cost:
    return Cost(
        parameters=count_parameters(network).total,
        multi_adds=count_multi_adds_720p(network, scale),
        flops=count_flops(network),
        activations=count_activations(network),
        convolutions=count_convolutions(network),
    )


def _measure_set(
    name: str, sources: list[Source], networks: dict[str, nn.Module], scale: int, rgb: bool, with_strips: bool
) -> _Measured:
    """Measure bicubic and each network on images of a set."""

    def read(source: Source) -> tuple[_Versions, np.ndarray]:
        original = read_image(source.hr)
        height, width = (length - length % scale for length in original.shape[:2])
        original = np.ascontiguousarray(original[:height, :width])
        small = read_image(source.lr[scale]) if scale in source.lr else bicubic_downscale(original, scale)
        return _Versions(original, {BICUBIC: bicubic_upscale(small, scale)}), small

    def run(pool: ThreadPoolExecutor) -> Iterator[_Versions]:
        for source, (versions, small) in zip(sources, _ahead(pool, read, sources, READ_AHEAD)):
            for key, network in networks.items():
                try:
                    versions.versions[key] = super_resolve(network, small)
                except InputError as error:
                    raise InputError(f'"{key}" cannot be measured on {source.hr}: {error}') from None
            yield versions

    def judge(versions: _Versions) -> tuple[dict[str, Fidelity], np.ndarray | None]:
        measures = measure_fidelity(versions.versions, versions.original, scale, rgb)
        return measures, _strip({**versions.versions, ORIGINAL: versions.original}) if with_strips else None

    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(tqdm(_ahead(pool, judge, run(pool), WORKERS), name, len(sources), leave=False, disable=None))
    return _Measured([measures for measures, _ in found], [strip for _, strip in found if strip is not None])


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """``map`` by other threads, in order, at most ``depth`` items ahead of who reads it; ``items`` is read here."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _measure_costs(
    costs: dict[str, Cost], contestants: dict[str, _Contestant], height: int, width: int, device: torch.device
) -> tuple[dict[str, Cost], str]:
    """The costs with runtimes and peak memory, and the conditions that they hold under."""
    networks = {name: one.network for name, one in contestants.items()}
    memory = {name: measure_peak_memory(network, height, width, device) for name, network in networks.items()}
    forms = {}
    for name, network in networks.items():
        forms[name, 'eager'] = network.to(device)
        forms[name, 'optimized'] = optimize(network)
    seconds = measure_runtimes(forms, height, width, device)
    costs = {
        name: replace(cost, runtime=seconds[name, 'eager'], optimized=seconds[name, 'optimized'], memory=memory[name])
        for name, cost in costs.items()
    }
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    return costs, f'input {width}x{height} (width x height), batch 1, float32, {where}, torch {torch.__version__}'


def _score(costs: dict[str, Cost], baseline: str) -> dict[str, Cost]:
    def values(cost: Cost) -> tuple[float, ...]:
        assert cost.runtime is not None  # whoever asks for scores has it measured
        return cost.runtime, cost.flops, cost.parameters

    reference = values(costs[baseline])
    return {name: replace(cost, score=ntire_score(values(cost), reference)) for name, cost in costs.items()}


def _strip(versions: dict[str, np.ndarray]) -> np.ndarray:
    """The same detail of all versions in one row, with captions: the detail on which bicubic errs most."""
    error = np.abs(versions[ORIGINAL].astype(np.float32) - versions[BICUBIC]).mean(2)
    side = min(PATCH, *error.shape)
    means = cv2.boxFilter(error, -1, (side, side), anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    means = means[: error.shape[0] - side + 1, : error.shape[1] - side + 1]
    top, left = np.unravel_index(means.argmax(), means.shape)
    tiles = []
    for name, version in versions.items():
        detail = version[top : top + side, left : left + side]
        detail = cv2.resize(detail, (PATCH * ZOOM, PATCH * ZOOM), interpolation=cv2.INTER_NEAREST)
        caption = np.full((24, PATCH * ZOOM, 3), 255, np.uint8)
        cv2.putText(caption, name, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(
            cv2.copyMakeBorder(
                np.concatenate([caption, detail]), 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)
            )
        )
    return np.concatenate(tiles, axis=1)
