"""From photographs to a better network: the steps of ``lora-sr adapt``, each of which a later call finds done."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lmdb
import torch
from torch import Tensor, nn

from lora_sr import threads
from lora_sr.adapt.held import Held, measure, measure_bicubic, read_held, side_for, write_held
from lora_sr.adapt.images import Images, find_images
from lora_sr.adapt.option_text import option_text
from lora_sr.adapt.outcome import Outcome
from lora_sr.adapt.pairs import look_at_pairs, write_training_pairs
from lora_sr.adapt.plan import MOST_VALIDATIONS, batches_for, has_fast_bfloat16, lora_for, schedule_for
from lora_sr.adapt.rates import find_rate, rate_for
from lora_sr.adapt.record import Record
from lora_sr.adapt.training import best_network, train
from lora_sr.adapted_folder import ADAPTER, BASE, DATA, HELD, MERGED, OPTIONS
from lora_sr.adapters import Adapter, extract_adapter, merge_adapter, mix_adapters, save_adapter
from lora_sr.adapters.verbs import adapted_modules
from lora_sr.archs import NetworkInfo, is_training_form, network_info
from lora_sr.checkpoints import AdapterFile, Checkpoint, NetworkSource, open_network
from lora_sr.checkpoints.adapter_file import fitted
from lora_sr.checkpoints.imports import IMPORTED
from lora_sr.checkpoints.layouts import in_layout, layout_of
from lora_sr.checkpoints.networks import OpenedNetwork
from lora_sr.checkpoints.origin import KEY, adapter_fingerprint, fingerprint
from lora_sr.checkpoints.sections import names_file
from lora_sr.checkpoints.writing import write_state
from lora_sr.errors import InputError
from lora_sr.files import check_output_folder, lock_path, write_errors, write_whole

PARTIAL = f'{DATA}.partial'
RATES = (1e-3, 2.5e-3, 6e-3, 1.5e-2)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
# Shares of the whole time.
OF_RATES, OF_VALIDATION, OF_END = 0.15, 0.006, 0.08
PATIENCE = 5  # validations without a better one
MOST_MINUTES = 60 * 24 * 7
# What the machine may be slower by than when a step was timed, and how long a process takes to begin: a schedule that
# is cut off loses most of what its end brings.
SLOWER, START_MINUTES = 1.5, 0.5
ENDS = {
    'no_rise': f'stopped: PSNR has not risen for {PATIENCE} validations',
    'time': 'stopped: its time was up',
    'interrupted': 'stopped by a signal; the best so far counts',
    'failed': 'stopped: it diverged; the best so far counts',
}
EMA = 0.97  # of the weights: an average over some thirty iterations


@dataclass(frozen=True)
class Adaptation:
    """What is to be adapted, to what.

    Attributes:
        network: The network to adapt, without LoRA.
        images: Those to adapt it to.
        minutes: How long all of it may take, about.
        share: Of the network's parameters that may train, 0 to 1; ``None`` for a tenth, or more where LoRA of rank 1
            takes more.
        aligns: Put right by how much LR is shifted on HR and how their colors differ.
        adapter: An adapter of the network to go on from; what is trained comes on top of it.
    """

    network: NetworkSource
    images: Images
    minutes: float = 10.0
    share: float | None = None
    aligns: bool = False
    adapter: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """What makes two adaptations the same one, for JSON."""
        images = self.images
        return {
            'network': _source(self.network),
            'hr': None if images.hr is None else os.path.abspath(images.hr),
            'lr': None if images.lr is None else os.path.abspath(images.lr),
            'teacher': None if images.teacher is None else _source(images.teacher),
            'minutes': self.minutes,
            'share': self.share,
            'align': self.aligns,
            'from': None if self.adapter is None else os.path.abspath(self.adapter),
        }


def _imports(source: NetworkSource) -> list[str]:
    return [os.path.abspath(one) if one.endswith('.py') else one for one in source.imports]


def _source(source: NetworkSource) -> dict[str, Any]:
    named = source.checkpoint
    return {
        'checkpoint': os.path.abspath(named) if isinstance(named, (str, os.PathLike)) else None,
        'options': None if source.options is None else os.path.abspath(source.options),
        'imports': _imports(source),
        'param_key': source.param_key,
    }


def adapt(
    adaptation: Adaptation, output: str | os.PathLike[str], told: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Adapt a network to the images of a camera, and write what becomes of it into a folder.

    Pairs are looked at, and a tenth of them is held back; a learning rate is found by short trainings, and training
    keeps what is best on the pairs held back; at last the strength of the update is chosen there. Into the folder come
    ``adapter.safetensors`` and ``merged.pth``, if something was gained, ``train.yml``, which repeats the training under
    stock BasicSR, and ``adapt.json``, all numbers. A call that finds a folder in which it was interrupted goes on
    there; one that finds all done gives what it came to.

    Args:
        adaptation: What to adapt, to what.
        output: The folder.
        told: Called with a line on each step.

    Returns:
        What it came to.

    Raises:
        InputError: Something of the input cannot be used, nothing can be trained, or the folder has another adaptation
            or cannot be written.
        KeyboardInterrupt: After Ctrl-C, except while it trains: then what is best so far is written.
    """
    folder = Path(output)
    if not 0 < adaptation.minutes <= MOST_MINUTES:
        raise InputError(f'--minutes must be above 0 and at most {MOST_MINUTES:,}, got {adaptation.minutes:g}.')
    if adaptation.share is not None and not 0 < adaptation.share <= 1:
        raise InputError(f'--share must be above 0% and at most 100%, got {100 * adaptation.share:.4g}%.')
    if adaptation.aligns and not adaptation.images.is_captured:
        raise InputError('--align must be left out without --pairs: images that are made lie where they should.')
    check_output_folder(folder)
    opened, info = _open(adaptation.network)
    state = {name: value.clone() for name, value in opened.network.state_dict().items()}
    before = None if adaptation.adapter is None else _go_on_from(adaptation.adapter, opened, adaptation.network.force)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        record = Record.of(folder, adaptation.to_dict())
        try:
            return _Run(adaptation, opened, info, state, before, folder, record, told).run()
        except InputError:
            record.withdraw()
            raise


@dataclass(frozen=True)
class _Run:
    adaptation: Adaptation
    opened: OpenedNetwork
    info: NetworkInfo
    base: Mapping[str, Tensor]  # of the network as it was before any adapter
    before: Adapter | None  # to go on from, which `opened.network` has in its weights
    folder: Path
    record: Record
    told: Callable[[str], None]

    @property
    def scale(self) -> int:
        return self.info.scale

    def run(self) -> Outcome:
        steps = self.record.steps
        if 'outcome' in steps:  # whatever has become of the files since
            return self.outcome()
        for name, step in (
            ('pairs', self.pairs),
            ('start', self.start),
            ('rates', self.rates),
            ('training', self.train),
            ('strength', self.strength),
        ):
            if name not in steps:
                self.record.put(name, step())
        outcome = self.outcome()
        if outcome.has_gained:
            self.write(outcome.strength)
        self.record.put('outcome', {**outcome.to_dict(), 'sentence': str(outcome)})
        return outcome

    def pairs(self) -> dict[str, Any]:
        """Look at the pairs, and write those to train on and those that are held back."""
        seconds = 60 * self.adaptation.minutes
        lora, trained = lora_for(self.opened.network, self.adaptation.share)  # which may be refused, before all else
        images = self.adaptation.images
        hr, lr, left_out = find_images(images, self.folder, self.scale, self.told)
        pairs = look_at_pairs(hr, lr, self.scale, self.adaptation.aligns, images.is_captured)
        pairs = replace(pairs, left_out={**pairs.left_out, **left_out})
        training, held = pairs.split()
        for reason in pairs.left_out.values():
            self.told(f'left out   {reason}')
        away = max(max(map(abs, pair.registration.shift)) for pair in pairs.used)
        lies = f'; LR lies within {away:.2f} LR pixels of HR, colors differ by {pairs.color:.0f} of 255'
        self.told(
            f'pairs      {len(pairs.used)}: {len(training)} to train on, {len(held)} held back'
            f'{lies if images.is_captured else ""}'
        )
        for note in pairs.notes:
            self.told(f'           {note}')
        smallest = min(min(pair.size) for pair in pairs.used)
        threads.look_again()
        batches = batches_for(self.opened.network, lora, self.info, smallest, seconds * (1 - OF_RATES - OF_END))
        total = sum(parameter.numel() for parameter in self.opened.network.parameters())
        rank = f'LoRA of rank {lora["rank"]}'
        self.told(f'network    {rank}: {trained:,} of {total:,} parameters train ({trained / total:.1%})')
        side = side_for(batches.seconds_per_pixel, len(held), seconds * OF_VALIDATION)
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        shutil.rmtree(self.folder / DATA, ignore_errors=True)
        try:
            (self.folder / PARTIAL).mkdir()
            write_training_pairs(training, self.folder / PARTIAL, self.scale, self.adaptation.aligns)
            write_held(held, self.folder / PARTIAL / HELD, self.scale, self.adaptation.aligns, side)
            os.replace(self.folder / PARTIAL, self.folder / DATA)
        except (OSError, lmdb.Error) as error:
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
            why = getattr(error, 'strerror', None) or error
            raise InputError(f'{self.folder} cannot be written: {why}.') from None
        write_state(self.opened.network.state_dict(), self.folder / BASE, self.opened.origin)
        return {
            **pairs.to_dict(),
            'training': [pair.name for pair in training],
            'held': [pair.name for pair in held],
            'lora': lora,
            'trained_parameters': trained,
            'parameters': total,
            'batch': batches.batch,
            'side': batches.side,
        }

    def start(self) -> dict[str, Any]:
        """Measure the network as it is, and bicubic interpolation."""
        held = self.held()
        start = measure(self.opened.network, held, self.scale)
        begin = time.perf_counter()
        measure(self.opened.network, held, self.scale, has_clean=False)  # as a validation, without what comes once
        seconds = time.perf_counter() - begin
        bicubic = measure_bicubic(held, self.scale)
        self.told(
            f'start      your camera {start.camera:.2f} dB (bicubic {bicubic.camera:.2f}), bicubic images '
            f'{start.clean:.2f} dB'
        )
        return {'start': asdict(start), 'bicubic': asdict(bicubic), 'seconds': seconds}

    def rates(self) -> dict[str, Any]:
        """Find the learning rate, and how long a step takes."""
        file = self.folder / OPTIONS
        threads.look_again()  # as the training will, for which a step is timed
        write_whole(file, self.options(RATES[0], 1000, MOST_VALIDATIONS, 10.0).encode())
        found = find_rate(
            file,
            RATES,
            60 * self.adaptation.minutes * OF_RATES,
            self.held(),
            self.scale,
            lambda rate, psnr: self.told(f'rate       {rate:g}: {psnr:.2f} dB'),
        )
        return {
            'psnr': {f'{rate:g}': psnr if math.isfinite(psnr) else None for rate, psnr in found.psnr.items()},
            'steps': found.steps,
            'step_seconds': found.step_seconds,
            'best': found.best,
            'top': found.top,
        }

    def train(self) -> dict[str, Any]:
        """Train for what is left of the time, or go on with it."""
        rates, start = self.record.steps['rates'], self.record.steps['start']
        if 'plan' not in self.record.steps:
            seconds = 60 * self.adaptation.minutes
            left = max(seconds * 0.1, seconds * (1 - OF_END) - self.record.seconds)
            schedule = schedule_for(left, rates['step_seconds'], start['seconds'])
            most = left / 60 * SLOWER + START_MINUTES
            rate = float(f'{rate_for(rates["top"], rates["steps"], schedule.iterations):.3g}')
            options = self.options(rate, schedule.iterations, schedule.validations, most)
            write_whole(self.folder / OPTIONS, options.encode())
            self.record.put('plan', {'iterations': schedule.iterations, 'minutes': left / 60, 'rate': rate})
        plan, base = self.record.steps['plan'], start['start']['camera']
        self.told(
            f'training   {plan["iterations"]:,} iterations at {plan["rate"]:g}, {plan["minutes"]:.1f} minutes; '
            'Ctrl-C keeps the best so far'
        )
        found = train(
            self.folder,
            PATIENCE,
            lambda iteration, psnr: self.told(f'           {iteration:>6,}: {psnr:.2f} dB ({psnr - base:+.2f})'),
        )
        if found.ended in ENDS:
            self.told(f'           {ENDS[found.ended]}')
        return {'psnr': found.psnr, 'iterations': found.iterations, 'ended': found.ended, 'best': found.best}

    def strength(self) -> dict[str, Any]:
        """Measure the network with more and less of the update."""
        best, held = best_network(self.folder), self.held()
        if not best.exists():
            return {}
        found = {}
        for strength in STRENGTHS:
            measured = measure(self.merged(strength), held, self.scale)
            found[f'{strength:g}'] = asdict(measured)
            self.told(
                f'strength   {strength:g}: your camera {measured.camera:.2f} dB, bicubic images {measured.clean:.2f} dB'
            )
        return found

    def outcome(self) -> Outcome:
        """What all of it has come to."""
        return Outcome.of(self.record.steps)

    def write(self, strength: float) -> None:
        """Write the adapter, of which all counts, and the merged network."""
        adapter = self.adapter(strength)
        if self.before is not None:
            adapter = mix_adapters([(self.before, 1.0), (adapter, 1.0)])
        origin = replace(self.opened.origin, base=fingerprint(self.base))
        save_adapter(adapter, self.folder / ADAPTER, True, {KEY: origin.to_json()})
        merged = in_layout(merge_adapter(self.base, adapter), layout_of(self.opened.network))
        origin = self.opened.origin.with_adapters(self.base, [adapter_fingerprint(adapter.tensors)])
        write_state(merged, self.folder / MERGED, replace(origin, layout=None))

    def adapter(self, strength: float) -> Adapter:
        """The best update, scaled."""
        checkpoint = Checkpoint.read(best_network(self.folder))
        return mix_adapters([(extract_adapter(checkpoint.state), strength)])

    def merged(self, strength: float) -> nn.Module:
        network = deepcopy(self.opened.network)
        network.load_state_dict(merge_adapter(network.state_dict(), self.adapter(strength)))
        return network

    def held(self) -> list[Held]:
        return read_held(self.folder / DATA / HELD, self.scale)

    def options(self, rate: float, iterations: int, validations: int, minutes: float) -> str:
        """The text of the option file."""
        base, pairs = self.opened.base, self.record.steps['pairs']
        assert base is not None
        if names_file(base):
            base['path'] = os.path.abspath(base['path'])  # the run is in another folder
        has_gpu = torch.cuda.is_available()
        return option_text(
            network=type(self.opened.network).__name__,
            scale=self.scale,
            base=base,
            lora=pairs['lora'],
            pretrain=None if names_file(base) else BASE,
            imports=[os.path.abspath(module.__file__) for module in IMPORTED if module.__file__],
            side=pairs['side'],
            batch=pairs['batch'],
            workers=4 if has_gpu else 0,
            amp='bf16' if has_fast_bfloat16() else None,
            ema_decay=EMA,
            rate=rate,
            iterations=iterations,
            minutes=minutes,
            validations=validations,
        )


def _open(source: NetworkSource) -> tuple[OpenedNetwork, NetworkInfo]:
    """The network to adapt, and what it takes.

    Raises:
        InputError: It cannot be read, carries LoRA, or takes and gives no RGB images of any size.
    """
    opened = open_network(source)
    if any(True for _ in adapted_modules(opened.network)):
        raise InputError(f'{opened.name} carries LoRA already: merge it with `lora-sr merge`, and adapt the result.')
    info = network_info(opened.network)
    if info is None or info.fixed_size is not None or (info.in_channels, info.out_channels) != (3, 3):
        raise InputError(f'{opened.name} must take and give RGB images of any size.')
    if info.scale < 2:
        raise InputError(f'{opened.name} must make images larger, got a network for x{info.scale}.')
    if opened.base is None:
        raise InputError(f'{opened.name} must be a file, which an option file can name.')
    return opened, info


def _go_on_from(path: Path, opened: OpenedNetwork, force: bool) -> Adapter:
    """Put an adapter into the weights of a network, and give it.

    Raises:
        InputError: It cannot be read, or does not fit; or the network is described by its file, which has its weights.
    """
    network = opened.network
    if names_file(opened.base):
        raise InputError(f'--from must be left out for a network that spandrel builds, got {path}.')
    state, content = network.state_dict(), None if opened.checkpoint is None else opened.checkpoint.content
    has_branches, layout = is_training_form(network), layout_of(network)
    file = AdapterFile.read(path)
    (adapter,) = fitted([file], state, opened.origin, opened.name, has_branches, layout, content, force)
    network.load_state_dict(merge_adapter(state, adapter))
    return adapter


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against a second call.

    Raises:
        InputError: One is at work there.
    """
    try:
        descriptor = lock_path(folder)
    except BlockingIOError:
        raise InputError(f'Another adaptation is at work in {folder}: wait for it, or choose another folder.') from None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
