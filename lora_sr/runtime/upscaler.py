"""A network ready for images as arrays: of any size, gray, color and alpha, 8 and 16 bits and floating point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.info import NetworkInfo, network_info, refusal
from lora_sr.archs.reparam import deploy_form
from lora_sr.archs.tiles import Cut, Span, cut_axis, find_cut, smallest_tile
from lora_sr.errors import InputError
from lora_sr.runtime.deployed import optimize
from lora_sr.runtime.tiling import (
    ENOUGH_MEMORY,
    ENOUGH_OVERLAPS,
    MEMORY_SHARE,
    bytes_per_pixel,
    free_memory,
    largest_tile,
)
from lora_sr.share import Share

BICUBIC_REACH = 2  # pixels on each side that an interpolated one depends on
LUMA = (0.299, 0.587, 0.114)  # of R, G and B in gray (BT.601)
FLAT_REACH = 8  # LR pixels around one of alpha: some networks look further than sprites are large
ALPHAS = ('bicubic', 'network')  # what enlarges alpha


class Upscaler:
    """A network ready to run on images of any size, whole where memory allows and in tiles where not.

    It runs on a CUDA GPU where there is one, else on that of a Mac (MPS), else on the CPU.

    Args:
        network: Any network for RGB or for gray images, (N, C, H, W) -> (N, C, scale * H, scale * W), e.g. from
            :func:`lora_sr.load_network`; LoRA in it is merged, and branches are folded. It takes and gives values in
            [0, 1]; those of a network for 0 to 255 are converted. It is not changed.
        tile: Side of the tiles in LR pixels, overlap included. By default the image is run whole if that needs no more
            than 512 MiB (of a CUDA GPU 8 GiB, of MPS 2 GiB) by a cautious estimate, and no more than half of what is
            free; else in the largest tiles that need no more. A network that looks far around gets larger ones, and one
            that looks at the whole image all of that half.
        dtype: What the network computes in. Its results are float32 in any case.

    Raises:
        InputError: The network takes other images, or images of one size; what it gives is not finite; the tile is too
            small for it; or it does not run in that dtype.
    """

    def __init__(self, network: nn.Module, tile: int | None = None, dtype: torch.dtype = torch.float32):
        self.name = type(network).__name__
        info = network_info(network)
        if info is None or info.fixed_size is not None or info.in_channels not in (1, 3):
            reason = refusal(network) if info is None else ''
            raise InputError(
                f'{self.name} does not take RGB or gray images of any size, as upscaling needs it{reason}.'
            )
        self.info = info
        self.channels, self.scale = info.in_channels, info.scale
        if info.out_channels != self.channels:
            raise InputError(
                f'{self.name} makes {info.out_channels} channels of {self.channels}, where equally many are right.'
            )
        network = _UnitRange(network, info) if info.value_range != 1 else network
        self.device = best_device()
        network = deepcopy(network).eval().requires_grad_(False)
        if self.device.type == 'mps':  # which has no float64, in which branches are folded
            network = deploy_form(network)
        self.network = network.to(self.device)
        side = info.side(32)
        # Not of zeros, which weights that are too large leave zeros.
        image = torch.rand(1, self.channels, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.inference_mode():
            trial = self.network(image)
        if not torch.isfinite(trial).all():
            raise InputError(self._not_finite(torch.float32))
        # What is written is made of it as well: float32 of all channels, and what is rounded from it.
        batch = 3 if self.channels == 1 else 1
        self._bytes_per_pixel = batch * (bytes_per_pixel(self.network, image) + 8 * self.channels * self.scale**2)
        self._cut: Cut | None = None  # until tiles are needed, and it is measured
        self.tile = tile
        if tile is not None:
            self._check_tile(tile)
        self.dtype = dtype
        try:
            self.runtime = optimize(self.network, dtype)
        except TypeError as error:
            if self.device.type != 'mps':
                raise
            raise InputError(f'--dtype must be one that this Mac computes in, got {dtype}: {error}.') from None

    @property
    def cut(self) -> Cut:
        """How tiles are cut, measured when it is first needed."""
        if self._cut is None:
            # Measured in float64, which MPS does not have.
            network = deepcopy(self.network).cpu() if self.device.type == 'mps' else self.network
            self._cut = find_cut(network, replace(self.info, value_range=1))
        return self._cut

    @property
    def looks_everywhere(self) -> bool:
        """Whether tiles change the result; ``False`` until they are needed, and it is measured."""
        return self._cut is not None and not self._cut.is_exact

    @property
    def overlap(self) -> int:
        """LR pixels on each inner side of a tile that are not kept."""
        return self.cut.overlap

    @property
    def multiple(self) -> int:
        """LR pixels of which tiles begin at multiples."""
        return self.cut.multiple

    def __call__(
        self,
        image: np.ndarray,
        on_tile: Callable[[int, int], None] | None = None,
        has_alpha: bool = True,
        alpha: str = 'bicubic',
    ) -> np.ndarray:
        """Upscale an image.

        Gray goes into a network for RGB as three equal channels, and what comes out becomes gray by BT.601's weights.
        Each channel of RGB goes through a network for gray by itself. Alpha is enlarged by bicubic interpolation, or by
        the network as a gray image. Bicubic keeps what is opaque to the last level. No network promises that, so where
        alpha is one value within 8 pixels around, or as far as the network looks if that is less, it is kept. Before
        the network runs, each pixel of alpha 0 gets the color of a visible one nearby, and has what becomes of it in
        the result: whatever is hidden there does not bleed into what is seen. An image without a visible pixel keeps
        its colors.

        Args:
            image: uint8, uint16 or float32, of shape (H, W) or (H, W, C): gray, gray and alpha, RGB, or RGB and alpha.
                Floating point is taken as it is, black and white being 0 and 1.
            on_tile: Called after each tile with its number, from 1, and the number of tiles.
            has_alpha: Whether a second or fourth channel hides what is under its zeros. It is enlarged as alpha anyway.
            alpha: ``'bicubic'`` or ``'network'``: what enlarges alpha.

        Returns:
            The same type and channels, of shape (scale * H, scale * W) or (scale * H, scale * W, C). Floating point is
            what the network gives, neither rounded nor clipped; alpha alone is clipped to [0, 1].

        Raises:
            InputError: The image is of another type or shape, or has values that are not finite; the result has some,
                as where float16 overflows; or there is no such ``alpha``.
        """
        planes = _planes(image)
        bands = self.bands(planes, on_tile, has_alpha, alpha)
        output = next(bands)
        height, width = self.scale * planes.shape[0], self.scale * planes.shape[1]
        if len(output) < height:
            first, output = output, np.empty((height, width, planes.shape[2]), image.dtype)
            start = 0
            for band in chain([first], bands):
                output[start : start + len(band)] = band
                start += len(band)
        return output.reshape(output.shape[: image.ndim])

    def bands(
        self,
        image: np.ndarray,
        on_tile: Callable[[int, int], None] | None = None,
        has_alpha: bool = True,
        alpha: str = 'bicubic',
    ) -> Iterator[np.ndarray]:
        """Upscale an image as a call does, and give the rows of the result as they are made.

        Args:
            image: As for a call, of shape (H, W, C).
            on_tile: As for a call.
            has_alpha: As for a call.
            alpha: As for a call.

        Yields:
            From top to bottom, (rows, scale * W, C) of the image's type: one array for each row of tiles.

        Raises:
            InputError: As a call does.
        """
        check_alpha(alpha)
        planes = _planes(image)
        height, width, channels = planes.shape
        colors = 3 if channels > 2 else 1
        if channels > colors and has_alpha:
            from lora_sr.images.alpha import without_hidden_colors  # imports OpenCV, which little here needs

            planes = without_hidden_colors(planes)
        by_network = channels > colors and alpha == 'network' and not _is_flat(planes[:, :, colors:])
        tiling = self._tiling(height, width)
        rows, columns = cut_axis(height, *tiling), cut_axis(width, *tiling)
        number = 0
        for row in rows:
            band = np.empty((self.scale * (row.last - row.first), self.scale * width, channels), image.dtype)
            for column in columns:
                tile = planes[row.start : row.stop, column.start : column.stop]
                kept = (
                    slice(self.scale * (row.first - row.start), self.scale * (row.last - row.start)),
                    slice(self.scale * (column.first - column.start), self.scale * (column.last - column.start)),
                )
                place = slice(self.scale * column.first, self.scale * column.last)
                with torch.inference_mode():
                    result = self._run(self._tensor(tile[:, :, :colors]))
                    band[:, place, :colors] = _stored(result[:, kept[0], kept[1]], image.dtype)
                    if by_network:
                        result = self._alpha_by_network(tile[:, :, colors:], has_alpha)
                        band[:, place, colors:] = _stored(result[:, kept[0], kept[1]], image.dtype)
                number += 1
                if on_tile is not None:
                    on_tile(number, len(rows) * len(columns))
            if channels > colors and not by_network:
                band[:, :, colors:] = self._alpha(planes[:, :, colors:], row, has_alpha)
            yield band

    @torch.inference_mode()
    def _alpha(self, alpha: np.ndarray, row: Span, has_alpha: bool) -> np.ndarray:
        """Bicubic interpolation of what of (H, W, 1) a row of tiles keeps, and of nothing that it does not need."""
        start, stop = max(0, row.first - BICUBIC_REACH), row.last + BICUBIC_REACH
        tensor = self._tensor(alpha[start:stop])
        if self.device.type == 'mps':  # which before torch 2.6 does not interpolate so
            tensor = tensor.cpu()
        enlarged = F.interpolate(tensor[None], scale_factor=self.scale, mode='bicubic', align_corners=False)[0]
        kept = slice(self.scale * (row.first - start), self.scale * (row.last - start))
        return _stored(enlarged[:, kept].clamp(0, 1) if has_alpha else enlarged[:, kept], alpha.dtype)

    def _alpha_by_network(self, alpha: np.ndarray, has_alpha: bool) -> Tensor:
        """What the network makes of (h, w, 1), but for where all around is a single value, which stays: (1, sh, sw)."""
        tensor = self._tensor(alpha)
        enlarged = self._run(tensor)
        reach = 2 * min(self.overlap, FLAT_REACH) + 1
        lowest, highest = -_highest(-tensor, reach), _highest(tensor, reach)
        is_flat, flat = (
            plane.repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)
            for plane in (lowest == highest, tensor)
        )
        result = torch.where(is_flat, flat, enlarged)
        return result.clamp(0, 1) if has_alpha else result

    def _tensor(self, planes: np.ndarray) -> Tensor:
        """(H, W, C) -> float32 (C, H, W), of whole numbers in [0, 1], on the device."""
        # Before 2.3 torch does not know uint16.
        tensor = torch.tensor(np.ascontiguousarray(planes, np.int32 if planes.dtype == np.uint16 else planes.dtype))
        if self.device.type == 'cuda':
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device).permute(2, 0, 1).float() / _peak(planes.dtype)

    def _run(self, colors: Tensor) -> Tensor:
        """(1 or 3, H, W) -> (the same, scale * H, scale * W)."""
        if self.channels == 1:
            result = self.runtime(colors[:, None].contiguous())[:, 0]
        else:
            result = self.runtime(colors.expand(3, -1, -1)[None].contiguous())[0]
            if len(colors) == 1:
                result = torch.tensordot(torch.tensor(LUMA, device=result.device), result, 1)[None]
        if not torch.isfinite(result.sum()) and not torch.isfinite(result).all():  # a sum may be too large by itself
            raise InputError(self._not_finite(self.dtype))
        return result

    def _not_finite(self, dtype: torch.dtype) -> str:
        reason = 'it has weights that are NaN or too large'
        if dtype == torch.float16:
            reason = 'float16 overflows where bfloat16 and float32 do not'
        return f'{self.name} gives values that are not finite: {reason}.'

    def _tiling(self, height: int, width: int) -> tuple[int, int, int]:
        """Tile, overlap and multiple for an image, as :func:`lora_sr.archs.tiles.cut_axis` takes them."""
        if self.tile is not None:
            return self.tile, self.overlap, self.multiple
        whole = max(height, width) + self.info.size_multiple, 0, self.info.size_multiple
        free = MEMORY_SHARE * free_memory(self.device)
        enough = min(free, ENOUGH_MEMORY[self.device.type])
        seen = math.prod(self.info.size(height, width))  # pixels, with those that pad the image
        if seen * self._bytes_per_pixel <= enough:
            return whole
        overlap = self.overlap
        tile = largest_tile(self._bytes_per_pixel, free)
        if not self.looks_everywhere:
            tile = min(tile, max(largest_tile(self._bytes_per_pixel, enough), ENOUGH_OVERLAPS * overlap))
        if seen <= tile**2:
            return whole
        # Below this the overlaps, or what pads a tile, would be most of the work.
        least = max(2 * smallest_tile(overlap, self.multiple), self.info.side(1))
        if self.info.is_square:  # and tiles longer than the image is high or wide are padded to their length
            tile = min(tile, self.info.side(min(height, width)))
        return max(tile, least), overlap, self.multiple

    def _check_tile(self, tile: int) -> None:
        smallest = smallest_tile(self.overlap, self.multiple)
        if tile < smallest:
            raise InputError(
                f'A tile of {tile} is too small for {self.name}, which needs an overlap of {self.overlap} on each '
                f'side: the smallest that works is {smallest}, and {2 * smallest} or more is many times as fast.'
            )


def check_alpha(alpha: str) -> None:
    """Check what is to enlarge alpha.

    Raises:
        InputError: It is none of :data:`ALPHAS`.
    """
    if alpha not in ALPHAS:
        raise InputError(f'alpha must be {" or ".join(ALPHAS)}, got {alpha}.')


def upscale_image(
    network: nn.Module, image: np.ndarray, tile: int | None = None, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Upscale one array; for several of them make an :class:`Upscaler` once, and call that.

    Args and returned value are those of :class:`Upscaler` and its call.
    """
    return Upscaler(network, tile, dtype)(image)


class _UnitRange(nn.Module):
    """A network for values from 0 to 255 as one for values from 0 to 1."""

    def __init__(self, network: nn.Module, info: NetworkInfo):
        super().__init__()
        self.network, self.top = network, info.value_range

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.top) / self.top


def best_device() -> torch.device:
    """The GPU where there is one: of CUDA, else of a Mac."""
    if torch.cuda.is_available():
        return torch.device('cuda')
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')


def use_own_gpu(share: Share) -> None:
    """Make the GPU of a process the current one of CUDA, where several on a machine share their work."""
    if torch.cuda.is_available():
        torch.cuda.set_device(share.local_rank % torch.cuda.device_count())


def _peak(dtype: np.dtype) -> int:
    """What stands for 1."""
    return 1 if dtype == np.float32 else np.iinfo(dtype).max


def _stored(image: Tensor, dtype: np.dtype) -> np.ndarray:
    """(C, H, W) -> (H, W, C): as it is, or of [0, 1] whole numbers."""
    if dtype != np.float32:
        image = (image.clamp(0, 1) * _peak(dtype)).round().to(torch.uint8 if dtype == np.uint8 else torch.int32)
    return image.permute(1, 2, 0).cpu().numpy().astype(dtype, copy=False)


def _is_flat(image: np.ndarray) -> bool:
    return bool((image == image.flat[0]).all())


def _highest(image: Tensor, side: int) -> Tensor:
    """The highest value in a square around each pixel of (1, H, W), as far as the image goes."""
    for kernel in ((side, 1), (1, side)):
        image = F.max_pool2d(image[None], kernel, 1, tuple(length // 2 for length in kernel))[0]
    return image


def _planes(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (H, W, C).

    Raises:
        InputError: It is no image.
    """
    if image.dtype not in (np.uint8, np.uint16, np.float32) or image.ndim not in (2, 3) or not image.size:
        raise InputError(
            f'The image has type {image.dtype} and shape {image.shape}: uint8, uint16 or float32 and (height, width) '
            'or (height, width, channels) are right.'
        )
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise InputError('The image must have finite values, got NaN or infinity.')
    planes = image if image.ndim == 3 else image[:, :, None]
    if planes.shape[2] > 4:
        raise InputError(f'The image has {planes.shape[2]} channels, where 1 to 4 are right.')
    return planes
