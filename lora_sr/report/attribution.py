"""Which pixels of the LR image a network uses for a patch of its output: local attribution maps (LAM).

J. Gu and C. Dong, "Interpreting Super-Resolution Networks with Local Attribution Maps" (CVPR 2021, arXiv:2011.11036).
Gradients of what a detector sees in the patch are integrated along a path of images, from a blurred one to the image
itself, on which the blur becomes less and less. What the paper leaves open is as in the authors' program (LAM_Demo,
https://github.com/X-Lowlevel-Vision/LAM_Demo): 50 steps, whose gradients are taken at their ends; a standard deviation
of 1.2 pixels; kernels of 9x9; and the channels are added up before the absolute value is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Callable

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from lora_sr.archs import NetworkInfo, network_info
from lora_sr.archs.info import refusal
from lora_sr.errors import InputError

STEPS, MOST_STEPS, SIGMA = 50, 1000, 1.2
KERNEL = 9  # LR pixels, the side of the blur
Window = tuple[int, int, int]
Detector = Callable[[Tensor, Window], Tensor]


def gradient_detector(output: Tensor, window: Window) -> Tensor:
    """How much detail an image has in a window: the sum of the magnitudes of its gradient, the paper's detector D.

    The gradient has the differences to the next pixel below and on the right. At the last row and column of the image
    there are none, and a window has so much less. Where the image is flat, whose magnitude has no derivative, that is
    taken for 0, so that no NaN gets into the attribution.

    Args:
        output: (1, C, H, W).
        window: ``(x, y, side)`` in pixels.

    Returns:
        A scalar, at least 0, in the unit of the image.
    """
    x, y, side = window
    patch = output[..., y : y + side + 1, x : x + side + 1]
    down, right = patch.diff(dim=-2)[..., :-1], patch.diff(dim=-1)[..., :-1, :]
    squares = down.square() + right.square()
    is_flat = squares == 0
    return squares.masked_fill(is_flat, 1).sqrt().masked_fill(is_flat, 0).sum()


def signed_attribution(
    network: nn.Module,
    image: Tensor,
    window: Window,
    steps: int = STEPS,
    sigma: float = SIGMA,
    detector: Detector = gradient_detector,
) -> Tensor:
    """What each value of an LR image contributes to what a detector sees in a window of a network's output.

    The path-integrated gradient of LAM (section "Local Attribution Maps" of the paper) along its progressive blurring:
    the sum over the steps of the gradient, at the end of a step, times the change of the image within that step. The
    more steps there are, the closer the sum of all values comes to the difference that the detector sees between the
    image and the blurred one.

    One step is held in memory at a time, at the cost of a forward and a backward pass.

    Args:
        network: Any network (N, C, h, w) -> (N, C', scale * h, scale * w), on any device and in any floating point.
            It runs in eval mode. Neither its weights nor their gradients nor its mode is changed.
        image: (1, C, h, w), in [0, 1]; for a network with values from 0 to 255 it is converted, and so is the output.
        window: ``(x, y, side)``, the left, the top and the side of a square, in pixels of the output.
        steps: Of the path, from 1 to 1,000.
        sigma: The standard deviation of the strongest blur, in LR pixels, more than 0.
        detector: ``(output, window)`` -> a scalar, for an output (1, C', scale * h, scale * w) in [0, 1].

    Returns:
        (C, h, w), float64, on the CPU.

    Raises:
        InputError: The network takes other images, gives values that are not finite, or lets no gradient through; the
            window is not within the output; or another argument is out of its range.
    """
    info = _info_of(network)
    _check_path(image, info, steps, sigma)
    height, width = image.shape[-2:]
    check_window(window, height * info.scale, width * info.scale)
    pixels = image[0].detach().double().cpu().numpy().transpose(1, 2, 0)
    parameter = next(network.parameters(), image)
    with _evaluating(network):
        total = torch.zeros(image.shape[1:], dtype=torch.float64)
        before = _blur(pixels, sigma)
        for step in range(1, steps + 1):
            after = _blur(pixels, sigma * (steps - step) / steps)
            given = _as_tensor(after)[None].to(parameter.device, parameter.dtype).requires_grad_()
            with allow_mutation_on_saved_tensors():  # PLKSR changes features in place in eval mode
                seen = detector(_run(network, given, info), window)
                (gradient,) = torch.autograd.grad(seen, given)
            total += gradient[0].double().cpu() * _as_tensor(after - before)
            before = after
    return total


def attribution_map(
    network: nn.Module,
    image: Tensor,
    window: Window,
    steps: int = STEPS,
    sigma: float = SIGMA,
    detector: Detector = gradient_detector,
) -> NDArray[np.float64]:
    """The local attribution map of a network: how much each LR pixel matters for a window of the output.

    As the authors' program has it: the absolute value of the sum of :func:`signed_attribution` over the channels,
    divided by its maximum.

    Args:
        network: See :func:`signed_attribution`, as for all other arguments.

    Returns:
        (h, w), in [0, 1] with a maximum of 1; all 0 where nothing is attributed, as of an image that a blur does not
        change.

    Raises:
        InputError: As :func:`signed_attribution`.
    """
    found: NDArray[np.float64] = signed_attribution(network, image, window, steps, sigma, detector).sum(0).abs().numpy()
    largest = found.max()
    return found / largest if largest > 0 else found


def diffusion_index(attribution: ArrayLike) -> float:
    """How far an attribution map spreads: ``(1 - G) * 100`` with its Gini coefficient G (the paper's diffusion index).

    G is the mean absolute difference between any two values over twice their mean. The index depends on how much of the
    image the map covers: compare those of maps of one size.

    Args:
        attribution: Values of any shape, at least 0, in any unit.

    Returns:
        From 100 / n, where one of n values has it all, to 100, where all are equal.

    Raises:
        InputError: A value is negative or not finite, or none is above 0.
    """
    values = np.sort(np.asarray(attribution, np.float64), axis=None)
    if not (values.size and np.isfinite(values).all() and values[0] >= 0 and values[-1] > 0):
        raise InputError(
            'An attribution map must have finite values of at least 0, and one above, got '
            + (f'values from {values[0]:g} to {values[-1]:g}.' if values.size else 'no values.')
        )
    count = values.size
    values = values / values[-1]  # so that no sum overflows
    gini = float((2 * np.arange(1, count + 1) - count - 1) @ values / (count * values.sum()))
    return (1 - gini) * 100


def check_window(window: Window, height: int, width: int) -> None:
    """Check that a window is within an output of so many pixels.

    Raises:
        InputError: It is not.
    """
    x, y, side = window
    if side < 1 or min(x, y) < 0 or x + side > width or y + side > height:
        raise InputError(
            f'The window must be a square within the {width} x {height} pixels of the output, got {side} x {side} '
            f'pixels at x {x}, y {y}.'
        )


def check_steps(steps: int) -> None:
    """Check a number of steps.

    Raises:
        InputError: It is less than 1, or so many that a slip of the keyboard is likelier than an integral.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise InputError(f'The steps must be from 1 to {MOST_STEPS:,}, got {steps}.')


def _info_of(network: nn.Module) -> NetworkInfo:
    info = network_info(network)
    if info is None:
        raise InputError(
            'The network must give an image that is a whole number of times as large as its input, got a '
            f'{type(network).__name__}{refusal(network)}.'
        )
    return info


def _check_path(image: Tensor, info: NetworkInfo, steps: int, sigma: float) -> None:
    if image.ndim != 4 or image.shape[:2] != (1, info.in_channels) or 0 in image.shape:
        raise InputError(
            f'The image must have the shape (1, {info.in_channels}, height, width), got {tuple(image.shape)}.'
        )
    check_steps(steps)
    if not 0 < sigma < np.inf:
        raise InputError(f'Sigma must be a number above 0, got {sigma}.')


def _run(network: nn.Module, image: Tensor, info: NetworkInfo) -> Tensor:
    """The output for an image, both in [0, 1]."""
    output: Tensor = network(image * info.value_range) / info.value_range
    if not output.isfinite().all():
        raise InputError('The network gives values that are not finite: it has weights that are NaN or too large.')
    if not output.requires_grad:
        raise InputError(
            f'The network must be one that gradients go through, got a {type(network).__name__} whose output has none, '
            'as what `lora_sr.optimize` makes.'
        )
    return output


def _blur(pixels: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """(h, w, C) under a Gaussian of 9x9 pixels; as it is for a ``sigma`` of 0. The image is mirrored at its borders."""
    if sigma == 0:
        return pixels
    first = pixels[:1, :1]  # a flat image stays as it is, to the last bit
    found = cv2.GaussianBlur(pixels - first, (KERNEL, KERNEL), sigma, borderType=cv2.BORDER_REFLECT_101)
    return first + found.reshape(pixels.shape)  # of which OpenCV drops a single channel


def _as_tensor(pixels: NDArray[np.float64]) -> Tensor:
    """(h, w, C) -> (C, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Let a network run in eval mode, with gradients, the same each time and without TF32, and put back its modes."""
    modes = {module: module.training for module in network.modules()}
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    try:
        network.eval()
        with torch.inference_mode(False), torch.enable_grad(), exact:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
