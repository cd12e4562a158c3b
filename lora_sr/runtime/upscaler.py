"""A network ready for images as arrays: of any size, gray, color and alpha, 8 and 16 bits."""

from __future__ import annotations

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
from lora_sr.archs.receptive_field import receptive_radius
from lora_sr.errors import InputError
from lora_sr.runtime.deployed import optimize
from lora_sr.runtime.tiling import (
    ENOUGH_MEMORY,
    ENOUGH_OVERLAPS,
    MEMORY_SHARE,
    Span,
    bytes_per_pixel,
    cut_axis,
    free_memory,
    largest_tile,
    smallest_tile,
)

BICUBIC_REACH = 2  # pixels on each side that an interpolated one depends on
LUMA = (0.299, 0.587, 0.114)  # of R, G and B in gray (BT.601)
BLIND_OVERLAP = 32  # LR pixels, for networks that look at the whole image


class Upscaler:
    """A network ready to run on images of any size, whole where memory allows and in tiles where not.

    It runs on the GPU where there is one.

    Args:
        network: Any network for RGB or for gray images, (N, C, H, W) -> (N, C, scale * H, scale * W), e.g. from
            :func:`lora_sr.load_network`; LoRA in it is merged, and branches are folded. It takes and gives values in
            [0, 1]; those of a network for 0 to 255 are converted. It is not changed.
        tile: Side of the tiles in LR pixels, overlap included. By default the image is run whole if that needs no more
            than 512 MiB (of a GPU 8 GiB) by a cautious estimate, and no more than half of what is free; else in the
            largest tiles that need no more. A network that looks far around gets larger ones, and one that looks at
            the whole image all of that half.
        dtype: What the network computes in. Its results are float32 in any case.

    Raises:
        InputError: The network takes other images, or images of one size; what it gives is not finite; or the tile is
            too small for it.
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
        self.channels, self.multiple, self.scale = info.in_channels, info.size_multiple, info.scale
        if info.out_channels != self.channels:
            raise InputError(
                f'{self.name} makes {info.out_channels} channels of {self.channels}, where equally many are right.'
            )
        network = _UnitRange(network, info) if info.value_range != 1 else network
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.network = deepcopy(network).eval().requires_grad_(False).to(self.device)
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
        self._overlap: int | None = None
        self.looks_everywhere = False
        self.tile = tile
        if tile is not None:
            self._check_tile(tile)
        self.dtype = dtype
        self.runtime = optimize(self.network, dtype)

    @property
    def overlap(self) -> int:
        """LR pixels on each inner side of a tile that are not kept, measured when they are first needed."""
        if self._overlap is None:
            found = receptive_radius(self.network, replace(self.info, value_range=1))
            self.looks_everywhere = found is None
            self._overlap = BLIND_OVERLAP if found is None else found
        return self._overlap

    def __call__(
        self, image: np.ndarray, on_tile: Callable[[int, int], None] | None = None, has_alpha: bool = True
    ) -> np.ndarray:
        """Upscale an image.

        Gray goes into a network for RGB as three equal channels, and what comes out becomes gray by BT.601's weights.
        Each channel of RGB goes through a network for gray by itself. Alpha is enlarged by bicubic interpolation: what
        is opaque stays so to the last level, which no network promises. Before the network runs, each pixel of alpha 0
        gets the color of a visible one nearby, and has what becomes of it in the result: whatever is hidden there does
        not bleed into what is seen. An image without a visible pixel keeps its colors.

        Args:
            image: uint8 or uint16, of shape (H, W) or (H, W, C): gray, gray and alpha, RGB, or RGB and alpha.
            on_tile: Called after each tile with its number, from 1, and the number of tiles.
            has_alpha: Whether a second or fourth channel hides what is under its zeros. It is enlarged as alpha anyway.

        Returns:
            The same type and channels, of shape (scale * H, scale * W) or (scale * H, scale * W, C).

        Raises:
            InputError: The image is of another type or shape; or values are not finite, as where float16 overflows.
        """
        planes = _planes(image)
        bands = self.bands(planes, on_tile, has_alpha)
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
        self, image: np.ndarray, on_tile: Callable[[int, int], None] | None = None, has_alpha: bool = True
    ) -> Iterator[np.ndarray]:
        """Upscale an image as a call does, and give the rows of the result as they are made.

        Args:
            image: As for a call, of shape (H, W, C).
            on_tile: As for a call.
            has_alpha: As for a call.

        Yields:
            From top to bottom, (rows, scale * W, C) of the image's type: one array for each row of tiles.

        Raises:
            InputError: As a call does.
        """
        planes = _planes(image)
        height, width, channels = planes.shape
        colors = 3 if channels > 2 else 1
        if channels > colors and has_alpha:
            from lora_sr.images.alpha import without_hidden_colors  # imports OpenCV, which little here needs

            planes = without_hidden_colors(planes)
        tiling = self._tiling(height, width)
        rows, columns = cut_axis(height, *tiling), cut_axis(width, *tiling)
        number = 0
        for row in rows:
            band = np.empty((self.scale * (row.last - row.first), self.scale * width, channels), image.dtype)
            for column in columns:
                with torch.inference_mode():
                    result = self._run(self._tensor(planes[row.start : row.stop, column.start : column.stop, :colors]))
                    kept = result[
                        :,
                        self.scale * (row.first - row.start) : self.scale * (row.last - row.start),
                        self.scale * (column.first - column.start) : self.scale * (column.last - column.start),
                    ]
                    band[:, self.scale * column.first : self.scale * column.last, :colors] = _rounded(kept, image.dtype)
                number += 1
                if on_tile is not None:
                    on_tile(number, len(rows) * len(columns))
            if channels > colors:
                band[:, :, colors:] = self._alpha(planes[:, :, colors:], row)
            yield band

    @torch.inference_mode()
    def _alpha(self, alpha: np.ndarray, row: Span) -> np.ndarray:
        """Bicubic interpolation of what of (H, W, 1) a row of tiles keeps, and of nothing that it does not need."""
        start, stop = max(0, row.first - BICUBIC_REACH), row.last + BICUBIC_REACH
        enlarged = F.interpolate(
            self._tensor(alpha[start:stop])[None], scale_factor=self.scale, mode='bicubic', align_corners=False
        )
        kept = slice(self.scale * (row.first - start), self.scale * (row.last - start))
        return _rounded(enlarged[0, :, kept], alpha.dtype)

    def _tensor(self, planes: np.ndarray) -> Tensor:
        """(H, W, C) of whole numbers -> float32 (C, H, W) in [0, 1] on the device."""
        peak = np.iinfo(planes.dtype).max
        # Before 2.3 torch does not know uint16.
        tensor = torch.tensor(np.ascontiguousarray(planes, np.uint8 if peak == 255 else np.int32))
        if self.device.type == 'cuda':
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.permute(2, 0, 1).float() / peak

    def _run(self, colors: Tensor) -> Tensor:
        """(1 or 3, H, W) in [0, 1] -> (the same, scale * H, scale * W)."""
        if self.channels == 1:
            result = self.runtime(colors[:, None].contiguous())[:, 0]
        else:
            result = self.runtime(colors.expand(3, -1, -1)[None].contiguous())[0]
            if len(colors) == 1:
                result = torch.tensordot(torch.tensor(LUMA, device=result.device), result, 1)[None]
        if not torch.isfinite(result.sum()):
            raise InputError(self._not_finite(self.dtype))
        return result

    def _not_finite(self, dtype: torch.dtype) -> str:
        reason = 'it has weights that are NaN or too large'
        if dtype == torch.float16:
            reason = 'float16 overflows where bfloat16 and float32 do not'
        return f'{self.name} gives values that are not finite: {reason}.'

    def _tiling(self, height: int, width: int) -> tuple[int, int, int]:
        """Tile, overlap and multiple for an image, as :func:`lora_sr.runtime.tiling.cut_axis` takes them."""
        if self.tile is not None:
            return self.tile, self.overlap, self.multiple
        whole = max(height, width) + self.multiple, 0, self.multiple
        free = MEMORY_SHARE * free_memory(self.device)
        enough = min(free, ENOUGH_MEMORY[self.device.type])
        if height * width * self._bytes_per_pixel <= enough:
            return whole
        overlap = self.overlap
        tile = largest_tile(self._bytes_per_pixel, free)
        if not self.looks_everywhere:
            tile = min(tile, max(largest_tile(self._bytes_per_pixel, enough), ENOUGH_OVERLAPS * overlap))
        if height * width <= tile**2:
            return whole
        # Below this the overlaps would be most of the work.
        return max(tile, 2 * smallest_tile(overlap, self.multiple)), overlap, self.multiple

    def _check_tile(self, tile: int) -> None:
        smallest = smallest_tile(self.overlap, self.multiple)
        if tile < smallest:
            raise InputError(
                f'A tile of {tile} is too small for {self.name}, which needs an overlap of {self.overlap} on each '
                f'side: the smallest that works is {smallest}, and {2 * smallest} or more is many times as fast.'
            )


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


def _rounded(image: Tensor, dtype: np.dtype) -> np.ndarray:
    """(C, H, W) in [0, 1] -> whole numbers (H, W, C)."""
    peak = np.iinfo(dtype).max
    whole = (image.clamp(0, 1) * peak).round().to(torch.uint8 if peak == 255 else torch.int32)
    return whole.permute(1, 2, 0).cpu().numpy().astype(dtype, copy=False)


def _planes(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (H, W, C).

    Raises:
        InputError: It is no image.
    """
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or not image.size:
        raise InputError(
            f'The image has type {image.dtype} and shape {image.shape}: uint8 or uint16 and (height, width) or '
            '(height, width, channels) are right.'
        )
    planes = image if image.ndim == 3 else image[:, :, None]
    if planes.shape[2] > 4:
        raise InputError(f'The image has {planes.shape[2]} channels, where 1 to 4 are right.')
    return planes
