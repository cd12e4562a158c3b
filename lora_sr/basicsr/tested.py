"""How a model runs its network on an image that it validates: without what training needs, and in tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Callable

import torch
from torch import nn

from lora_sr.archs.info import network_info
from lora_sr.archs.tiles import Cut, cut_axis, find_cut, smallest_tile

KNOWN = ('torch.', 'basicsr.', 'lora_sr.')


@contextlib.contextmanager
def overridden(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object attributes that stand before those of its class for a while."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


@contextlib.contextmanager
def tested(model: Any, iteration: int) -> Iterator[None]:
    """Let a model ``test`` under ``inference_mode``, and in tiles of ``val.tile``.

    What is made in that mode can never be trained on. Networks of others may keep something, as a mask for the size of
    an image, and use it in training, and models of others may adapt to an image: these are tested as BasicSR does it.
    """
    network = getattr(model, 'net_g', None)
    if not hasattr(model, 'test') or not isinstance(network, nn.Module):
        yield
        return
    test, side = model.test, (model.opt.get('val') or {}).get('tile')
    network = model.get_bare_model(getattr(model, 'net_g_ema', network))
    is_known = all(type(part).__module__.startswith(KNOWN) for part in (model, *network.modules()))
    cut: Cut | None = None

    def run() -> None:
        nonlocal cut
        with torch.inference_mode(is_known):
            if side is None:
                test()
                return
            cut = cut or _cut_of(model, network, iteration)
            run_in_tiles(model, test, int(side), cut)

    with overridden(model, test=run):
        yield


def _cut_of(model: Any, network: nn.Module, iteration: int) -> Cut:
    """How images may be cut for a network as it is now, measured once for all sets of a validation."""
    known: tuple[int, Cut] | None = getattr(model, 'measured_cut', None)
    if known is None or known[0] != iteration:
        network = deepcopy(network).eval()
        info = network_info(network)
        assert info is not None  # it has been checked with the option file
        model.measured_cut = known = iteration, find_cut(network, info)
    return known[1]


def run_in_tiles(model: Any, test: Callable[[], None], side: int, cut: Cut) -> None:
    """Call ``test``, which makes ``model.output`` of ``model.lq``, for tiles of it, and put their results together.

    Args:
        model: With ``lq``, (N, C, H, W).
        test: Its method.
        side: Of the tiles, in LR pixels; they are larger where the network as it is now needs that.
        cut: How its images may be cut.
    """
    image = model.lq
    side = max(side, smallest_tile(cut.overlap, cut.multiple))
    rows, columns = (cut_axis(length, side, cut.overlap, cut.multiple) for length in image.shape[2:])
    whole = None
    try:
        for row in rows:
            for column in columns:
                model.lq = image[:, :, row.start : row.stop, column.start : column.stop]
                test()
                scale = model.output.shape[2] // model.lq.shape[2]
                if whole is None:
                    size = [scale * length for length in image.shape[2:]]
                    whole = model.output.new_empty(*model.output.shape[:2], *size)
                kept = [slice(scale * (s.first - s.start), scale * (s.last - s.start)) for s in (row, column)]
                place = [slice(scale * s.first, scale * s.last) for s in (row, column)]
                whole[(..., *place)] = model.output[(..., *kept)]
    finally:
        model.lq = image
    model.output = whole
