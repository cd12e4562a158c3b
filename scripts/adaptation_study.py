"""What to train when a network is adapted to a camera: the trainings behind the tables of ``docs/results.md``.

``python scripts/adaptation_study.py LKDN_x2.pth --pairs HR LR --test HR LR -o LKDN.jsonl`` trains the network in each
way of ``METHODS``, all for equally many iterations on the same patches. For each the learning rate climbs in factors
of 2 as long as PSNR on the pairs held back rises; the best is run again with other seeds. Each run is a line of the
output, and a second call does only what is missing there. ``--table`` prints what a file has.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_sr import load_network
from lora_sr.adapt.held import Held, measure
from lora_sr.adapt.plan import has_fast_bfloat16
from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    allocate_ranks,
    base_weight,
    count_parameters,
    delta_kind,
    layer_importance,
    mark_trainable,
)
from lora_sr.adapters.layers import is_depthwise, matrix_shape
from lora_sr.archs import network_info
from lora_sr.basicsr.step.networks import StepNetworks
from lora_sr.basicsr.step.settings import StepSettings
from lora_sr.data.sources import find_sources, read_image
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale

RATES = [1e-3 * 2**power for power in range(-5, 7)]
PROBED = 8  # batches of which gradients and activations are the mean
EMA = 0.97


@dataclass(frozen=True)
class Method:
    """A way to train. With ``rank`` 0 all weights train.

    Attributes:
        rank: Of LoRA.
        also_train: As in an option file.
        depthwise_rank: Of LoRA of depth-wise layers; 0 leaves them as they are, unless ``also_train`` has them.
        strength: What the update counts: alpha / rank.
        b_rate: How many times the rate of A the rate of B is (LoRA+, arXiv:2402.12354).
        init: Of A: ``kaiming``; ``gradient``, the main directions of the first gradient (after LoRA-GA,
            arXiv:2407.05000; B stays 0); ``activation``, of the layer's input (EVA, arXiv:2410.07170); ``weight``, of
            the weight itself, which then loses them (PiSSA, arXiv:2404.02948).
        importance: How the ranks of all layers are chosen at the budget of ``rank`` everywhere: by the singular values
            of the ``gradient``, or of the gradient over the root of its mean square, ``fisher``.
        loss: ``mse`` or ``l1``.
        augments: Whether patches are flipped and rotated at random.
    """

    rank: int = 0
    also_train: Sequence[str] = ()
    depthwise_rank: int = 0
    strength: float = 1.0
    b_rate: float = 1.0
    init: str = 'kaiming'
    importance: str | None = None
    loss: str = 'mse'
    augments: bool = False


DELTAS = ('bias', 'norm')
METHODS = {
    'all weights': Method(),
    'rank 2': Method(2),
    'rank 8': Method(8),
    'rank 1, biases, norms': Method(1, DELTAS),
    'rank 2, biases, norms': Method(2, DELTAS),
    'rank 8, biases, norms': Method(8, DELTAS),
    'rank 2, biases, norms, depth-wise': Method(2, (*DELTAS, 'depthwise')),
    'rank 2, biases, norms, rank 1 depth-wise': Method(2, DELTAS, depthwise_rank=1),
    'rank 8, alpha 2': Method(8, strength=2 / 8),
    'rank 8, rsLoRA': Method(8, strength=2 / math.sqrt(8)),  # alpha = 2
    'rank 2, biases, norms, LoRA+ 4': Method(2, DELTAS, b_rate=4),
    'rank 2, biases, norms, LoRA+ 16': Method(2, DELTAS, b_rate=16),
    'rank 2, biases, norms, A from gradients': Method(2, DELTAS, init='gradient'),
    'rank 2, biases, norms, A from activations': Method(2, DELTAS, init='activation'),
    'rank 2, biases, norms, PiSSA': Method(2, DELTAS, init='weight'),
    'ranks by gradients, biases, norms': Method(2, DELTAS, importance='gradient'),
    'ranks by Fisher, biases, norms': Method(2, DELTAS, importance='fisher'),
    'ranks of rank 1 by gradients, biases, norms': Method(1, DELTAS, importance='gradient'),
    'ranks of rank 1 by Fisher, biases, norms': Method(1, DELTAS, importance='fisher'),
    'rank 1, biases, norms, L1, flips and rotations': Method(1, DELTAS, loss='l1', augments=True),
    'rank 2, biases, norms, L1, flips and rotations': Method(2, DELTAS, loss='l1', augments=True),
    'rank 2, biases, norms, flips and rotations': Method(2, DELTAS, augments=True),
    'rank 2, biases, norms, L1': Method(2, DELTAS, loss='l1'),
    'all weights, L1, flips and rotations': Method(loss='l1', augments=True),
}
LOSSES = {'mse': nn.functional.mse_loss, 'l1': nn.functional.l1_loss}


class Patches:
    """Random patches of pairs of images, flipped and rotated at random if ``augments``."""

    def __init__(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], side: int, batch: int, augments: bool, seed: int
    ):
        self.pairs, self.side, self.batch, self.augments = pairs, side, batch, augments
        self.random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """LR and HR, (batch, 3, height, width), RGB, 0 to 1."""
        while True:
            chosen = [self.one() for _ in range(self.batch)]
            low, high = (torch.from_numpy(np.stack(images)) for images in zip(*chosen))
            yield tuple(images.flip(-1).permute(0, 3, 1, 2).float() / 255 for images in (low, high))

    def one(self) -> tuple[np.ndarray, np.ndarray]:
        """LR and HR of a patch, (side, side, 3) and so many times as large, uint8, BGR."""
        hr, lr = self.pairs[self.random.integers(len(self.pairs))]
        scale = hr.shape[0] // lr.shape[0]
        top, left = (self.random.integers(length - self.side + 1) for length in lr.shape[:2])
        turns, is_flipped = self.random.integers(4), self.random.random() < 0.5
        cut = []
        for image, factor in ((lr, 1), (hr, scale)):
            rows, columns = (slice(start * factor, (start + self.side) * factor) for start in (top, left))
            patch = image[rows, columns]
            if self.augments:
                patch = np.ascontiguousarray(np.rot90(patch[:, ::-1] if is_flipped else patch, turns))
            cut.append(patch)
        return cut[0], cut[1]


class Study:
    """A network, its pairs, and the settings that all runs share."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.network = load_network(arguments.checkpoint).to(memory_format=torch.channels_last)
        info = network_info(self.network)
        assert info is not None
        self.scale = info.scale
        pairs = _pairs(arguments.pairs, self.scale)
        held = {int((number + 0.5) * len(pairs) / arguments.held) for number in range(arguments.held)}
        self.held = [self._measured(*pairs[number]) for number in sorted(held)]
        self.training = [pair for number, pair in enumerate(pairs) if number not in held]
        self.test = [self._measured(*pair) for pair in _pairs(arguments.test, self.scale)[:: arguments.test_every]]

    def _measured(self, hr: np.ndarray, lr: np.ndarray) -> Held:
        """The middle of a pair."""
        height, width = (min(length, self.arguments.measured_side) for length in lr.shape[:2])
        top, left = ((length - side) // 2 for length, side in zip(lr.shape[:2], (height, width)))
        hr = hr[top * self.scale : (top + height) * self.scale, left * self.scale : (left + width) * self.scale]
        return Held('', hr, lr[top : top + height, left : left + width], bicubic_downscale(hr, self.scale))

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Train, and measure the average of the weights."""
        torch.manual_seed(seed)
        network, method = deepcopy(self.network), METHODS[name]
        groups = self.prepare(network, method) if method.rank else [([*network.parameters()], 1.0)]
        trained = [parameter for parameters, _ in groups for parameter in parameters]
        optimizer = torch.optim.Adam([{'params': some} for some, _ in groups if some], betas=(0.9, 0.99))
        factors = [factor for some, factor in groups if some]
        average = [parameter.detach().clone() for parameter in trained]
        iterations, start, step = self.arguments.iterations, time.perf_counter(), self.step(network)
        for number, (low, high) in zip(range(iterations), self.patches(method, seed)):
            cosine = (1 + math.cos(math.pi * number / iterations)) / 2
            for group, factor in zip(optimizer.param_groups, factors):
                group['lr'] = rate * factor * cosine
            with step.active():
                loss = LOSSES[method.loss](network(low), high)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not math.isfinite(loss.item()):
                break
            torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 1 - EMA)
        for parameter, value in zip(trained, average):
            parameter.data.copy_(value)
        return {
            'method': name,
            'rate': rate,
            'seed': seed,
            'share': sum(map(Tensor.numel, trained)) / sum(value.numel() for value in self.network.parameters()),
            'held': self.psnr(network, self.held),
            'test': self.psnr(network, self.test),
            'seconds': time.perf_counter() - start,
        }

    def prepare(self, network: nn.Module, method: Method) -> list[tuple[list[nn.Parameter], float]]:
        """Put LoRA into a network; what trains, and how many times the rate each has."""
        depthwise = [name for name, module in network.named_modules() if is_depthwise(module)]
        kinds = {delta_kind(module, name) for module in network.modules() for name in module._parameters}
        also_train = [kind for kind in method.also_train if kind in kinds]
        section: dict[str, Any] = {'groups': ['all'], 'rank': method.rank, 'also_train': also_train}
        if method.depthwise_rank:
            section['rank_pattern'] = {re.escape(name): method.depthwise_rank for name in depthwise}
        elif 'depthwise' not in method.also_train:
            section['exclude_modules'] = [re.escape(name) for name in depthwise]
        if method.importance:
            section['rank_pattern'] = self.ranks(section, method)
        add_lora(network, LoRAConfig.from_dict({**section, 'alpha': None}))
        mark_trainable(network)
        layers = {name: layer for name, layer in network.named_modules() if 'lora_A' in layer._parameters}
        for layer in layers.values():
            layer.lora_alpha.mul_(method.strength)  # of each layer's rank
        if method.init != 'kaiming':
            directions = {'gradient': self.gradients, 'activation': self.activations, 'weight': self.weights}
            for name, matrix in directions[method.init](list(layers), method).items():
                _turn(layers[name], matrix, method.init == 'weight')
        first = [layer.lora_A for layer in layers.values()]
        second = [layer.lora_B for layer in layers.values()]
        known = {id(parameter) for parameter in (*first, *second)}
        rest = [value for value in network.parameters() if value.requires_grad and id(value) not in known]
        return [(first, 1.0), (second, method.b_rate), (rest, 1.0)]

    def ranks(self, section: dict[str, Any], method: Method) -> dict[str, int]:
        """A rank for each layer, at the budget of equal ranks."""
        adapted = add_lora(deepcopy(self.network), LoRAConfig.from_dict({**section, 'also_train': []}))
        layers = {name: layer for name, layer in adapted.named_modules() if 'lora_A' in layer._parameters}
        gradients = self.gradients(list(layers), method)
        gains = {name: layer_importance(layer, gradients[name]) for name, layer in layers.items()}
        chosen = allocate_ranks(gains, count_parameters(adapted).lora, 32)
        return {re.escape(name): rank for name, rank in chosen.items()}

    def gradients(self, names: Sequence[str], method: Method) -> dict[str, Tensor]:
        """Mean gradients of weights; for Fisher's importance over the root of their mean squares."""
        network = deepcopy(self.network)
        weights = {name: base_weight(network.get_submodule(name)) for name in names}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for low, high in self.probe(method):
            network.zero_grad()
            LOSSES[method.loss](network(low), high).backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                sums[name] += weight.grad / PROBED
                squares[name] += weight.grad.square() / PROBED
        if method.importance == 'fisher':
            return {name: sums[name] / (squares[name].sqrt() + 1e-12) for name in names}
        return sums

    def activations(self, names: Sequence[str], method: Method) -> dict[str, Tensor]:
        """Covariances of what each column of A sees: (columns, columns)."""
        network, found = deepcopy(self.network), {}

        def look(name: str, layer: Any, given: Tensor) -> None:
            columns = matrix_shape(layer.weight.shape, layer.groups)[1]
            padding = 0 if isinstance(layer.padding, str) else layer.padding
            seen = nn.functional.unfold(given.float(), layer.kernel_size, layer.dilation, padding)
            seen = seen.transpose(0, 1).flatten(1)  # (in * kh * kw, positions)
            parts = seen.view(-1, columns, seen.shape[-1])  # each of them meets the same A
            found[name] = found.get(name, 0) + (parts @ parts.transpose(1, 2)).sum(0)

        for name in names:
            layer = network.get_submodule(name)
            layer.register_forward_pre_hook(lambda own, given, name=name: look(name, own, given[0]))
        with torch.inference_mode():
            for low, _ in self.probe(method):
                network(low)
        return {name: value.clone() for name, value in found.items()}

    def weights(self, names: Sequence[str], method: Method) -> dict[str, Tensor]:
        """Those of the network."""
        return {name: base_weight(self.network.get_submodule(name)).detach() for name in names}

    def probe(self, method: Method) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches by which a start is chosen."""
        return (batch for _, batch in zip(range(PROBED), self.patches(method, 999)))

    def patches(self, method: Method, seed: int) -> Patches:
        """Batches of the pairs to train on, the same for equal seeds but for flips and rotations."""
        return Patches(self.training, self.arguments.side, self.arguments.batch, method.augments, seed)

    def step(self, network: nn.Module) -> StepNetworks:
        """Let a network run as in a training by an option file."""
        step = StepNetworks(StepSettings(torch.bfloat16 if self.arguments.bf16 else None), torch.channels_last)
        step.add('network_g', network)
        return step

    def psnr(self, network: nn.Module, held: Sequence[Held]) -> float:
        """Mean PSNR (Y) in dB; ``-inf`` where the network has diverged."""
        try:
            return measure(deepcopy(network), held, self.scale, has_clean=False).camera
        except InputError:
            return -math.inf


def _turn(layer: Any, matrix: Tensor, is_taken: bool) -> None:
    """Let A of a layer begin with the main directions of the rows of a matrix, and B with what it takes of a weight."""
    columns = layer.lora_A.shape[1]
    left, values, right = torch.linalg.svd(matrix.reshape(-1, columns), full_matrices=False)
    rank = min(layer.lora_A.shape[0], len(values))
    with torch.no_grad():
        if not is_taken:
            layer.lora_A[:rank] = right[:rank] * layer.lora_A.norm(dim=1).mean()
            return
        root = values[:rank].sqrt()
        layer.lora_A[:rank] = root[:, None] * right[:rank]
        layer.lora_B[:, :rank] = left[:, :rank] * root
        base_weight(layer).sub_(layer.delta_weight())


def _pairs(folders: Sequence[str], scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """HR and LR, uint8, BGR, in the order of their names."""
    hr, lr = folders
    found = []
    for source in find_sources([hr], [scale], [lr]):
        high, low = read_image(source.hr), read_image(source.lr[scale])
        found.append((high[: low.shape[0] * scale, : low.shape[1] * scale], low))
    return found


def study(arguments: argparse.Namespace) -> None:
    """Do the runs that the output has not."""
    file = Path(arguments.output)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(line['method'], line['rate'], line['seed']): line for line in lines}
    trainings = Study(arguments)
    if ('as published', 0, 0) not in known:
        own = {kind: trainings.psnr(trainings.network, getattr(trainings, kind)) for kind in ('held', 'test')}
        known['as published', 0, 0] = line = {'method': 'as published', 'rate': 0, 'seed': 0, **own}
        _append(file, line)

    def get(name: str, rate: float, seed: int) -> dict[str, Any]:
        if (name, rate, seed) not in known:
            known[name, rate, seed] = line = trainings.run(name, rate, seed)
            _append(file, line)
        return known[name, rate, seed]

    for name in arguments.method or METHODS:
        tried = [rate for method, rate, seed in known if method == name and seed == 0]
        start = max(tried, key=lambda rate: known[name, rate, 0]['held']) if tried else arguments.start
        best = RATES.index(min(RATES, key=lambda rate: abs(math.log(rate / start))))
        for step in (1, -1):
            while 0 <= best + step < len(RATES):
                if get(name, RATES[best + step], 0)['held'] <= get(name, RATES[best], 0)['held']:
                    break
                best += step
        for seed in range(1, arguments.seeds):
            get(name, RATES[best], seed)


def _append(file: Path, line: dict[str, Any]) -> None:
    with open(file, 'a') as stream:
        stream.write(json.dumps(line) + '\n')
    print(line, flush=True)


def table(file: Path) -> str:
    """What was found, as Markdown: for each method its best rate, and mean and spread over the seeds."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = ['| | trained | rate | seeds | held back | test |', '| --- | --- | --- | --- | --- | --- |']
    for name in dict.fromkeys(line['method'] for line in lines):
        own = [line for line in lines if line['method'] == name]
        rate = max((line for line in own if line['seed'] == 0), key=lambda line: line['held'])['rate']
        best = [line for line in own if line['rate'] == rate]
        cells = [f'{best[0]["share"]:.1%}' if rate else '', f'{rate:g}' if rate else '', str(len(best)) if rate else '']
        for kind in ('held', 'test'):
            values = [line[kind] for line in best]
            spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
            cells.append(f'{statistics.fmean(values):.3f}{spread}')
        rows.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--pairs', nargs=2, metavar=('HR', 'LR'), help='to train on, and to hold some of back')
    parser.add_argument('--test', nargs=2, metavar=('HR', 'LR'), help='to report, and to choose nothing on')
    parser.add_argument('-o', '--output', help='the runs, a line of JSON each', required=True)
    parser.add_argument('--table', action='store_true', help='print what the output has, and train nothing')
    parser.add_argument('--method', action='append', choices=list(METHODS), help='only this; may be repeated')
    parser.add_argument('--held', type=int, default=5, help='how many pairs are held back')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--iterations', type=int, default=400)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--side', type=int, default=32, help='of the patches, in LR pixels')
    parser.add_argument('--start', type=float, default=4e-3, help='the first learning rate')
    parser.add_argument('--bf16', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--measured-side', type=int, default=10**6, help='measure on the middle of images, so many LR pixels each way'
    )
    parser.add_argument('--test-every', type=int, default=1, metavar='N', help='test on every Nth pair')
    arguments = parser.parse_args()
    if arguments.table:
        if not Path(arguments.output).is_file():
            parser.error(f'--output must be a file of runs, got {arguments.output}, which is none.')
        print(table(Path(arguments.output)))
        return
    if None in (arguments.checkpoint, arguments.pairs, arguments.test):
        parser.error('a checkpoint, --pairs and --test must be given to train.')
    if arguments.bf16 and not has_fast_bfloat16():
        parser.error('--bf16 must be left out here: without instructions for it a step takes ten times as long.')
    try:
        study(arguments)
    except InputError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
