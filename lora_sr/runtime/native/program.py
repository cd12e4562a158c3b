"""A network as a list of operations on maps, which the compiled kernels run for any size of image."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_sr.errors import InputError

# As in kernels.cpp.
LOAD_IMAGE, POINTWISE, CONV3X3, DEPTHWISE, CHANNEL_NORM = range(5)
ACTIVATIONS = {None: 0, 'silu': 1, 'gelu': 2}
COMBINATIONS = {None: 0, 'add': 1, 'multiply': 2, 'gate': 3}
MOST_INPUTS, MOST_PLANES, ROWS = 16, 1024, 4

BORDER = 16  # words of zeros beside each row of a plane: a 5x5 of dilation 3 reaches 6
TASKS_PER_THREAD = 8  # in a step at least, so that no thread waits long for the others

# Winograd's transform of a kernel of 3 for 4 results, with the points 0, +-NEAR, +-FAR and infinity of kernels.cpp
# (Lavin and Gray, arXiv:1509.09308): the kernel as a polynomial at each point, over the product of the point's
# distances to the other points.
NEAR, FAR = 0.75, 1.25
POINTS = (0.0, NEAR, -NEAR, FAR, -FAR)
WINOGRAD = [
    [point**power / math.prod(point - other for other in POINTS if other != point) for power in range(3)]
    for point in POINTS
] + [[0.0, 0.0, 1.0]]


class _Map(ctypes.Structure):
    _fields_ = [
        ('data', ctypes.c_void_p),
        ('row', ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ('rows', 'channels', 'is_bfloat16')),
    ]


class _Operation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ('kind', 'activation', 'combination', 'lag', 'kernel', 'dilation')),
        *((name, ctypes.c_int32) for name in ('outputs', 'blocks', 'inputs')),
        ('input', _Map * MOST_INPUTS),
        ('other', _Map),
        ('output', _Map),
        *((name, ctypes.c_void_p) for name in ('weight', 'bias', 'image')),
        *((name, ctypes.c_int64) for name in ('image_plane', 'image_row')),
        ('scale', ctypes.c_int32),
        ('epsilon', ctypes.c_float),
    ]


class _Size(ctypes.Structure):
    _fields_ = [
        *(('height', ctypes.c_int32), ('width', ctypes.c_int32), ('pitch', ctypes.c_int64), ('zeros', ctypes.c_void_p)),
    ]


@dataclass(eq=False)
class Map:
    """Features of so many channels, of which memory is only given to it for a size, see :class:`Program`."""

    channels: int
    is_bfloat16: bool

    @property
    def planes(self) -> int:
        """How many planes of 32-bit words it takes: one for each channel, or for two in bfloat16."""
        return (self.channels + 1) // 2 if self.is_bfloat16 else self.channels


@dataclass
class _Step:
    kind: int
    inputs: Sequence[Map]
    output: Map
    weight: Tensor
    bias: Tensor
    other: Map | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    to_image: bool = False

    @property
    def reach(self) -> int:
        """How many rows above and below the one that it makes it reads."""
        if self.kind == DEPTHWISE:
            return int(self.numbers['kernel'] // 2 * self.numbers['dilation'])
        return 1 if self.kind == CONV3X3 else 0

    @property
    def reads(self) -> list[tuple[Map, int]]:
        """Each map that it reads, and how far above and below."""
        reads = [(source, self.reach) for source in self.inputs]
        return reads if self.other is None else [*reads, (self.other, 0)]


class Program:
    """The operations of a network, in their order; the verbs add one each, and :meth:`__call__` runs them.

    Nothing depends on the size of the image but the memory: that of the largest size is kept. Not more than one thread
    runs a program at a time; the others wait. As with torch's own, its threads do not survive a fork: a forked process
    has to run it with one.

    Args:
        library: The kernels, see :func:`lora_sr.runtime.native.library.load_library`.
        dtype: Of the features between the layers: ``torch.float32``, or ``torch.bfloat16`` where the kernels have it.
            Sums are float32 in any case.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype = torch.float32) -> None:
        self.library = library
        library.scratch.restype = library.operation_bytes.restype = ctypes.c_int64
        of_library = library.operation_bytes(), library.most_inputs(), library.most_planes()
        if of_library != (ctypes.sizeof(_Operation), MOST_INPUTS, MOST_PLANES):
            raise RuntimeError('kernels.cpp and program.py disagree about an operation')
        address, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.run.argtypes = [address, integer, address, integer, integer, address, number]
        library.run.restype = None
        self.dtype = dtype
        self.steps: list[_Step] = []
        self.groups: list[list[int]] = [[]]
        self.scale = 1
        self._lock = threading.Lock()
        self._size: tuple[int, int, int] | None = None  # height, width, threads
        self._memory = _words(0)

    @property
    def fits(self) -> bool:
        """Whether no operation reads more than the kernels can."""
        return all(
            len(step.inputs) <= MOST_INPUTS and sum(source.planes for source in step.inputs) <= MOST_PLANES
            for step in self.steps
        )

    def begin_group(self) -> None:
        """Begin a new pipeline: for long networks, whose maps would not stay in the caches together."""
        self.groups.append([])

    def load_image(self, factor: Tensor, summand: Tensor) -> Map:
        """The image, each channel times its ``factor`` plus its ``summand``; always in float32."""
        return self._add(LOAD_IMAGE, [], Map(len(factor), False), factor, summand)

    def conv(
        self,
        inputs: Sequence[Map],
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        combination: str | None = None,
        other: Map | None = None,
        dtype: torch.dtype | None = None,
    ) -> Map:
        """A convolution, 1x1, or 3x3 with a border of zeros, over the channels of ``inputs`` one after the other.

        Args:
            inputs: What is read. They have the same number of channels; of a 3x3 there is one.
            weight: (out, in, 1, 1) or (out, in, 3, 3).
            bias: (out,), or None for 0.
            activation: ``silu`` or ``gelu`` of the result.
            combination: What is done to it then, with ``other``: ``add``, ``multiply``, or SPAN's ``gate``,
                (result + other) * (sigmoid(result) - 0.5).
            other: As many channels.
            dtype: Of the result; by default the program's.
        """
        output = self._map(len(weight), dtype)
        return self._convolve(inputs, weight, bias, activation, combination, other, output)

    def conv_to_image(self, inputs: Sequence[Map], weight: Tensor, bias: Tensor, scale: int) -> None:
        """A convolution as in :meth:`conv`, whose channels a pixel shuffle takes to the image that is the result."""
        self.scale = scale
        self._convolve(inputs, weight, bias, None, None, None, Map(len(weight), False))
        self.steps[-1].to_image = True
        self.steps[-1].numbers['scale'] = scale

    def depthwise(
        self,
        source: Map,
        weight: Tensor,
        bias: Tensor,
        dilation: int = 1,
        activation: str | None = None,
        combination: str | None = None,
        other: Map | None = None,
        dtype: torch.dtype | None = None,
    ) -> Map:
        """A convolution in each channel, of odd size, with a border of zeros; the others are those of :meth:`conv`.

        Args:
            source: What is read.
            weight: (channels, 1, k, k), k 3 or 5.
            bias: (channels,).
            dilation: Pixels from one tap to the next; (k // 2) * dilation is at most 16.
        """
        kernel = weight.shape[-1]
        even = (0, len(weight) % 2)  # bfloat16 takes channels in pairs
        return self._add(
            DEPTHWISE,
            [source],
            self._map(source.channels, dtype),
            F.pad(weight.flatten(1), (0, 0, *even)),
            F.pad(bias, even),
            other,
            activation=ACTIVATIONS[activation],
            combination=COMBINATIONS[combination],
            kernel=kernel,
            dilation=dilation,
        )

    def channel_norm(self, source: Map, weight: Tensor, bias: Tensor, epsilon: float, other: Map) -> Map:
        """Each pixel normalized over its channels, times ``weight`` plus ``bias``, plus ``other``."""
        numbers = {'combination': COMBINATIONS['add'], 'epsilon': epsilon}
        output = self._map(source.channels, None)
        return self._add(CHANNEL_NORM, [source], output, weight, bias, other, **numbers)

    def __call__(self, image: Tensor) -> Tensor:
        """(N, C, H, W) on the CPU -> (N, C', scale * H, scale * W), both in float32.

        Raises:
            InputError: The image is on another device, or has other channels.
        """
        expected = self.steps[0].output.channels
        is_image = image.is_floating_point() and image.ndim == 4 and image.shape[1] == expected
        if image.device.type != 'cpu' or not is_image:
            raise InputError(
                f'The network takes images (N, {expected}, H, W) of floating point on the CPU, where it was optimized, '
                f'not {tuple(image.shape)} of {image.dtype} on {image.device}.'
            )
        image = image.float().resolve_neg().contiguous()
        number, _, height, width = image.shape
        channels = self.steps[-1].output.channels // self.scale**2
        result = _words(number, channels, height * self.scale, width * self.scale)
        threads = torch.get_num_threads()
        with self._lock:
            if self._size != (height, width, threads):
                self._plan(height, width, threads)
            first, last = self._operations[0], self._operations[len(self.steps) - 1]
            for source, target in zip(image, result):
                first.image, last.image = source.data_ptr(), target.data_ptr()
                for group in self.groups:
                    self.library.run(
                        ctypes.addressof(self._operations[group[0]]),
                        *(len(group), ctypes.addressof(self._dimensions), self._strips, threads),
                        *(self._scratch.data_ptr(), self._scratch.shape[1]),
                    )
        return result

    def _map(self, channels: int, dtype: torch.dtype | None) -> Map:
        return Map(channels, (self.dtype if dtype is None else dtype) == torch.bfloat16)

    def _add(
        self,
        kind: int,
        inputs: Sequence[Map],
        output: Map,
        weight: Tensor,
        bias: Tensor,
        other: Map | None = None,
        **numbers: float,
    ) -> Map:
        weight, bias = (value.detach().contiguous().clone() for value in (weight, bias))
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        self.groups[-1].append(len(self.steps))
        self.steps.append(_Step(kind, inputs, output, weight, bias.float(), other, numbers))
        return output

    def _convolve(
        self,
        inputs: Sequence[Map],
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        combination: str | None,
        other: Map | None,
        output: Map,
    ) -> Map:
        most = self.library.most_outputs()
        blocks = -(-len(weight) // most)
        outputs = -(-len(weight) // blocks)
        if output.is_bfloat16:
            outputs += outputs % 2
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if weight.shape[-1] == 1:
            kind, taps = POINTWISE, weight[:, :, None, :, 0]  # (out, in, points, taps)
        else:
            kind = CONV3X3
            transform = torch.tensor(WINOGRAD, dtype=torch.float64, device='cpu')
            taps = torch.einsum('pk,oikx->oipx', transform, weight.double())
        return self._add(
            kind,
            inputs,
            output,
            pack(taps, [source.channels for source in inputs], inputs[0].is_bfloat16, blocks, outputs),
            F.pad(bias, (0, blocks * outputs - len(bias))),
            other,
            activation=ACTIVATIONS[activation],
            combination=COMBINATIONS[combination],
            blocks=blocks,
            outputs=outputs,
        )

    def _plan(self, height: int, width: int, threads: int) -> None:
        """Memory for the maps of a size, and the operations with its addresses.

        A step takes as many strips of ROWS rows as give all threads enough to do.
        """
        self._size = None  # whatever stops this leaves no mixture of two sizes
        pitch = BORDER + -(-width // BORDER) * BORDER
        pitch += BORDER * (pitch // BORDER % 2 == 0)  # an odd number of cache lines: planes do not share cache sets
        strips = max(1, -(-TASKS_PER_THREAD * threads // max(map(len, self.groups))))
        rows, lags = self._pipeline(height, ROWS * strips)
        place, total = self._place(rows)
        # Behind everything a row of zeros; kernels read whole vectors, also at its end.
        most = max(step.output.planes for step in self.steps)
        words = BORDER + (total + most) * pitch + 5 * BORDER
        if self._memory.numel() < words:
            self._memory = _words(0)  # not both at once
            self._memory = _words(words)
        self._memory[:words].zero_()
        start = self._memory.data_ptr() + 4 * BORDER

        def describe(features: Map) -> _Map:
            address = start + 4 * place[features] * pitch
            return _Map(address, features.planes * pitch, rows[features], features.channels, features.is_bfloat16)

        self._operations = (_Operation * len(self.steps))()
        for step, lag, operation in zip(self.steps, lags, self._operations):
            operation.kind, operation.lag = step.kind, lag
            for name, number in step.numbers.items():
                setattr(operation, name, number)
            operation.inputs = len(step.inputs)
            for i, source in enumerate(step.inputs):
                operation.input[i] = describe(source)
            if step.other is not None:
                operation.other = describe(step.other)
            operation.output = _Map(0, 0, 1, step.output.channels, 0) if step.to_image else describe(step.output)
            operation.weight, operation.bias = step.weight.data_ptr(), step.bias.data_ptr()
        scale = self.scale
        self._operations[0].image_plane, self._operations[0].image_row = height * width, width
        last = self._operations[len(self.steps) - 1]
        last.image_plane, last.image_row = height * width * scale**2, width * scale
        self._dimensions = _Size(height, width, pitch, start + 4 * total * pitch)
        self._strips = strips
        self._scratch = _words(threads, -(-self.library.scratch(most) // BORDER) * BORDER)
        self._size = height, width, threads

    def _pipeline(self, height: int, rows_of_step: int) -> tuple[dict[Map, int], list[int]]:
        """How many rows each map keeps, and by how many steps each operation follows the first of its group."""
        made = {step.output: i for i, step in enumerate(self.steps)}
        rows = dict.fromkeys(made, 0)
        lags = [0] * len(self.steps)
        for group in self.groups:
            for i in group:
                for source, reach in self.steps[i].reads:
                    if made[source] in group:
                        lags[i] = max(lags[i], lags[made[source]] + 1 + -(-reach // rows_of_step))
            for i in group:
                for source, reach in self.steps[i].reads:
                    kept = height
                    if made[source] in group:
                        kept = (lags[i] - lags[made[source]] + 1) * rows_of_step + reach
                    rows[source] = max(rows[source], min(kept, height))
        return rows, lags

    def _place(self, rows: dict[Map, int]) -> tuple[dict[Map, int], int]:
        """Where each map is, and what they take together, in planes of one row.

        Maps that later groups read have their own places while they are needed; the others of a group begin behind.
        """
        group_of = {self.steps[i].output: number for number, group in enumerate(self.groups) for i in group}
        last_use: dict[Map, int] = {}
        for number, group in enumerate(self.groups):
            for i in group:
                last_use.update((used, number) for used, _ in self.steps[i].reads)
        place: dict[Map, int] = {}
        end = 0
        free: dict[int, list[int]] = {}
        for number in range(len(self.groups)):
            for kept in [m for m in last_use if group_of[m] == number < last_use[m]]:
                size = kept.planes * rows[kept]
                if free.get(size):
                    place[kept] = free[size].pop()
                else:
                    place[kept], end = end, end + size
            for done in [m for m in place if last_use[m] == number]:
                free.setdefault(done.planes * rows[done], []).append(place[done])
        total = end
        for number in range(len(self.groups)):
            position = end
            for passing in [m for m in last_use if group_of[m] == number == last_use[m]]:
                place[passing] = position
                position += passing.planes * rows[passing]
            total = max(total, position)
        return place, total


def _words(*shape: int) -> Tensor:
    """Memory that the kernels read or write, whatever the defaults of torch are."""
    return torch.empty(shape, dtype=torch.float32, device='cpu')


def pack(weight: Tensor, channels: list[int], in_pairs: bool, blocks: int, outputs: int) -> Tensor:
    """The weights of a convolution in the order in which the kernels read them.

    Args:
        weight: (out, in, points, taps): of each point of Winograd's transform, the taps along the width.
        channels: Of each of the maps that are read, together ``in``.
        in_pairs: Two channels of a map side by side, in bfloat16; an odd last one beside a zero.
        blocks: Blocks of outputs.
        outputs: Outputs of a block; together at least ``out``, the others are zeros.

    Returns:
        (blocks, points, planes, taps, outputs), and (…, 2) in bfloat16 for pairs.
    """
    if in_pairs:
        weight = round_keeping_sums(weight)
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, blocks * outputs - len(weight)))
    if in_pairs:
        parts = [F.pad(part, (0, 0, 0, 0, 0, part.shape[1] % 2)) for part in weight.split(channels, 1)]
        weight = torch.cat(parts, 1).unflatten(1, (-1, 2)).unflatten(0, (blocks, outputs))
        return weight.permute(0, 4, 2, 5, 1, 3).to(torch.bfloat16)
    return weight.unflatten(0, (blocks, outputs)).permute(0, 3, 2, 4, 1)


def round_keeping_sums(weight: Tensor) -> Tensor:
    """Values of bfloat16 near ``weight`` (…, taps), whose sums over the taps are nearer to its sums than rounding's.

    Neighboring pixels are much alike, so it is the sum that a flat part of an image meets, with the same sign
    everywhere, while the errors of single taps average out. Each tap takes over what the larger ones before it lost.
    """
    order = weight.abs().argsort(-1, descending=True)
    lost = torch.zeros_like(weight[..., 0])
    rounded = torch.empty_like(weight)
    for i in range(weight.shape[-1]):
        tap = order[..., i : i + 1]
        wanted = weight.gather(-1, tap)[..., 0] + lost
        value = wanted.to(torch.bfloat16).to(weight.dtype)
        lost = wanted - value
        rounded.scatter_(-1, tap, value[..., None])
    return rounded
