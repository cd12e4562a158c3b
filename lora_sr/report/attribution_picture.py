"""A picture of what networks look at: an LR image, and the local attribution map of each network over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import nn

from lora_sr.archs import deploy_form, network_info, take_any_size
from lora_sr.archs.info import refusal
from lora_sr.checkpoints import NetworkLike, OpenedNetwork, open_network
from lora_sr.data.sources import read_image
from lora_sr.errors import InputError, printable
from lora_sr.files import check_not_input, check_output, check_regular, write_whole
from lora_sr.report.attribution import STEPS, Window, attribution_map, check_steps, check_window, diffusion_index
from lora_sr.report.text import align
from lora_sr.runtime.pixels import image_to_tensor
from lora_sr.runtime.upscaler import Upscaler, best_device

SIDE = 16  # pixels of the output, the side of a window that is chosen
CONTEXT = 64  # LR pixels, the side of what is looked at
PANEL, CAPTION, GAP = 256, 24, 4  # pixels of the picture
RED, YELLOW = (0, 0, 255), (0, 255, 255)


@dataclass(frozen=True)
class Attributions:
    """What networks look at.

    Args:
        window: ``(x, y, side)`` in pixels of the whole output.
        context: ``(x, y, width, height)`` in LR pixels of the whole image: what the maps cover.
        scale: Of the networks.
        part: uint8, (height, width, 3), BGR: the context itself.
        maps: Name -> map of shape (height, width), see :func:`lora_sr.report.attribution.attribution_map`.
    """

    window: Window
    context: tuple[int, int, int, int]
    scale: int
    part: NDArray[np.uint8]
    maps: dict[str, NDArray[np.float64]]

    @property
    def inner_window(self) -> Window:
        """The window in pixels of the output of the context."""
        (x, y, side), (left, top, _, _) = self.window, self.context
        return x - left * self.scale, y - top * self.scale, side

    @property
    def indices(self) -> dict[str, float]:
        """Name -> diffusion index of its map."""
        return {name: diffusion_index(found) for name, found in self.maps.items()}

    def __str__(self) -> str:
        x, y, side = self.window
        _, _, width, height = self.context
        table = [['', 'diffusion index'], *([name, f'{index:.2f}'] for name, index in self.indices.items())]
        return (
            f'window: {side} x {side} pixels of the output at x {x}, y {y}, in {width} x {height} LR pixels\n'
            + align(table)
        )


def draw_attributions(
    networks: Mapping[str, NetworkLike | OpenedNetwork],
    image: str | os.PathLike[str],
    output: str | os.PathLike[str],
    window: Window | None = None,
    steps: int = STEPS,
    context: int = CONTEXT,
    overwrite: bool = False,
) -> Attributions:
    """Draw the local attribution maps of networks for one window of their outputs.

    The networks run in deploy form, on a GPU where there is one, on a part of the image with the window in its middle,
    as far as the image goes: so the memory is bounded, and indices of different images compare.

    Args:
        networks: Name -> whatever :func:`lora_sr.load_network` takes, or a network that has been opened.
        image: The LR image, of 8 bits.
        output: A PNG file to write: the LR image with the window, and for each network its map, the redder the more a
            pixel matters, over the image in gray.
        window: ``(x, y, side)`` in pixels of the output; by default what :func:`choose_window` chooses of the outputs.
        steps: Of each map, see :func:`lora_sr.report.attribution.signed_attribution`.
        context: LR pixels, the side of the part of the image that is looked at.
        overwrite: Replace ``output`` where it exists.

    Returns:
        The maps.

    Raises:
        InputError: A network or the image cannot be used, the networks have different scales, the window is not within
            the output or larger than the context, nothing in it depends on details of the image, or the picture cannot
            be written. All that can be told beforehand is told before any run.
    """
    output = Path(output)
    check_output(output, ('.png',), overwrite)
    check_not_input(output, [image])
    check_regular(image, 'the image')
    check_steps(steps)
    if context < 1:
        raise InputError(f'The context must be at least 1 LR pixel, got {context}.')
    pixels = read_image(Path(image))
    height, width = pixels.shape[:2]
    opened = {name: open_to_attribute(name, source) for name, source in networks.items()}
    scale = common_scale(opened)
    if window is None:
        side = min(SIDE, height * scale, width * scale, context * scale)
        window = choose_window([_upscale(name, network, pixels) for name, network in opened.items()], side)
    attributions = attribute(opened, pixels, window, steps, context)
    write_whole(output, cv2.imencode('.png', _picture(attributions))[1].tobytes())
    return attributions


def open_to_attribute(name: str, source: NetworkLike | OpenedNetwork) -> nn.Module:
    """A network as :func:`attribute` takes it: in deploy form, for RGB images of any size. ``source`` is not changed.

    Args:
        name: Of the network, for messages.
        source: Whatever :func:`lora_sr.load_network` takes, or a network that has been opened.

    Raises:
        InputError: It cannot be opened, or takes or gives other images.
    """
    if not name.isprintable():
        raise InputError(f'Names must be printable, got "{printable(name)}".')
    try:
        opened = source if isinstance(source, OpenedNetwork) else open_network(source)
        network = deploy_form(opened.network)
    except InputError as error:
        raise InputError(f'"{name}": {error}') from None
    info = network_info(network)
    if info is None or info.fixed_size is not None or (info.in_channels, info.out_channels) != (3, 3):
        reason = refusal(network) if info is None else ''
        raise InputError(
            f'"{name}" must take and give RGB images of any size, which {type(network).__name__} does not{reason}.'
        )
    return take_any_size(network)


def attribute(
    networks: Mapping[str, nn.Module],
    pixels: NDArray[np.uint8],
    window: Window,
    steps: int = STEPS,
    context: int = CONTEXT,
) -> Attributions:
    """The local attribution maps of networks for one window of their outputs.

    Args:
        networks: Name -> what :func:`open_to_attribute` gives, all of one scale.
        pixels: uint8, (H, W, 3), BGR: the whole LR image.
        window: As for :func:`draw_attributions`.
        steps: Likewise.
        context: Likewise.

    Returns:
        The maps.

    Raises:
        InputError: The networks have different scales or cannot be attributed, the window is not within the output or
            larger than the context, or nothing in it depends on details of the image.
    """
    (height, width), scale = pixels.shape[:2], common_scale(networks)
    check_window(window, height * scale, width * scale)
    x, y, side = window
    left, columns = _span(x, side, width, scale, context)
    top, rows = _span(y, side, height, scale, context)
    part = np.ascontiguousarray(pixels[top : top + rows, left : left + columns])
    attributions = Attributions(window, (left, top, columns, rows), scale, part, {})
    device = best_device()
    for name, network in networks.items():
        try:
            found = attribution_map(network.to(device), image_to_tensor(part), attributions.inner_window, steps)
        except InputError as error:
            raise InputError(f'"{name}": {error}') from None
        network.cpu()
        if not found.any():
            raise InputError(
                f'The window must show what depends on details of the image, got {side} x {side} pixels at x {x}, '
                f'y {y}, in which "{name}" gives the same of a blurred one.'
            )
        attributions.maps[name] = found
    return attributions


def choose_window(outputs: Sequence[NDArray[np.uint8]], side: int, margin: int | None = None) -> Window:
    """The window to look at: where networks differ most, or where a single one gives most detail.

    Of several outputs it is the range of their values that is added up over the window and the channels; of one, the
    magnitude of its gradient, as :func:`lora_sr.report.attribution.gradient_detector` has it. Of equal windows the
    first counts, row by row.

    Args:
        outputs: uint8, of one shape (H, W, 3).
        side: Of the window, in pixels, at most H and W.
        margin: The distance of windows from the borders, in pixels, as far as there is room; by default their side, for
            networks differ most in what they make of the borders of an image.

    Returns:
        ``(x, y, side)``.
    """
    values = np.stack(outputs).astype(np.float64)
    if len(values) > 1:
        spread = (values.max(0) - values.min(0)).sum(2)
    else:
        down, right = np.zeros((2, *values[0].shape))
        down[:-1], right[:, :-1] = np.diff(values[0], axis=0), np.diff(values[0], axis=1)
        spread = np.hypot(down, right)
        spread[-1] = spread[:, -1] = 0
        spread = spread.sum(2)
    # Sums over all windows, each by its first pixel. Of several outputs they are whole numbers, and exact.
    sums = np.pad(spread.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    totals = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    bottom, right_end = totals.shape
    margin = side if margin is None else margin
    margin_y, margin_x = min(margin, (bottom - 1) // 2), min(margin, (right_end - 1) // 2)
    inner = totals[margin_y : bottom - margin_y, margin_x : right_end - margin_x]
    y, x = np.unravel_index(inner.argmax(), inner.shape)
    return int(x) + margin_x, int(y) + margin_y, side


def common_scale(networks: Mapping[str, nn.Module]) -> int:
    """The scale of networks that :func:`open_to_attribute` gives.

    Raises:
        InputError: They have several.
    """
    scales = {name: _scale(network) for name, network in networks.items()}
    if len(set(scales.values())) > 1:
        listed = ', '.join(f'"{name}" x{scale}' for name, scale in scales.items())
        raise InputError(f'The networks must have one scale, got {listed}.')
    return next(iter(scales.values()))


def lay_over(image: NDArray[np.uint8], found: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A map over an image in gray, the redder the more a pixel matters.

    How red a pixel is, is the square root of its attribution: else few would show.

    Args:
        image: (h, w, 3), BGR.
        found: (h, w), in [0, 1].

    Returns:
        (h, w, 3), BGR.
    """
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    share = np.sqrt(found)[:, :, None]
    laid_over: NDArray[np.uint8] = (gray * (1 - share) + np.array(RED) * share).round().astype(np.uint8)
    return laid_over


def _scale(network: nn.Module) -> int:
    info = network_info(network)
    assert info is not None  # as opening has checked
    return info.scale


def _upscale(name: str, network: nn.Module, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    try:
        upscaled: NDArray[np.uint8] = Upscaler(network)(np.ascontiguousarray(pixels[:, :, ::-1]))
    except InputError as error:
        raise InputError(f'"{name}": {error}') from None
    return upscaled


def _span(start: int, side: int, length: int, scale: int, context: int) -> tuple[int, int]:
    """The first LR pixel, and how many, with a window of the output in the middle, along one axis of the image."""
    first, behind = start // scale, -(-(start + side) // scale)  # LR pixels that the window covers
    kept = min(context, length)
    if behind - first > kept:
        raise InputError(f'The context must be at least {behind - first} LR pixels for this window, got {context}.')
    middle = round((start + side / 2) / scale - kept / 2)
    return min(max(middle, behind - kept, 0), first, length - kept), kept


def _picture(attributions: Attributions) -> NDArray[np.uint8]:
    """The panels beside each other, BGR."""
    part, indices = attributions.part, attributions.indices
    shown = {'LR': part}
    shown |= {f'{indices[name]:.2f} {name}': lay_over(part, found) for name, found in attributions.maps.items()}
    window, scale = attributions.inner_window, attributions.scale
    panels = [_panel(caption, image, window, scale) for caption, image in shown.items()]
    picture: NDArray[np.uint8] = np.concatenate(panels, axis=1)
    return picture


def _panel(caption: str, image: NDArray[np.uint8], window: Window, scale: int) -> NDArray[np.uint8]:
    """An image with whole pixels enlarged, the window outlined and a caption above."""
    zoom = max(1, PANEL // max(image.shape[:2]))
    enlarged = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    x, y, side = window
    start, end = (x * zoom // scale, y * zoom // scale), ((x + side) * zoom // scale, (y + side) * zoom // scale)
    cv2.rectangle(enlarged, start, (end[0] - 1, end[1] - 1), YELLOW, 1)
    head = np.full((CAPTION, enlarged.shape[1], 3), 255, np.uint8)
    cv2.putText(head, caption, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    panel = np.concatenate([head, enlarged])
    white = (255, 255, 255)
    return cv2.copyMakeBorder(panel, 0, GAP, GAP // 2, GAP // 2, cv2.BORDER_CONSTANT, value=white).astype(np.uint8)
