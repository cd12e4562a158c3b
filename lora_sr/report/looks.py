"""What two networks look at in pairs: local attribution maps before and after, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from lora_sr.adapted_folder import LR
from lora_sr.data.sources import read_image
from lora_sr.errors import InputError
from lora_sr.report.attribution import Window
from lora_sr.report.attribution_picture import (
    SIDE,
    Attributions,
    attribute,
    choose_window,
    lay_over,
    open_to_attribute,
)
from lora_sr.report.crops import BeforeAfter, data_url, extent
from lora_sr.report.markup import heading, paragraph, text

STEPS = 10  # of a map: a page has up to four, each of so many forward and backward passes on 64x64 LR pixels
MOST_PARAMETERS = 2_000_000  # of a network: half a minute of a CPU for a page
BEFORE, AFTER = 'The network before', 'The network after'
INTRODUCTION = (
    'Local attribution maps of the most and the least improved pair: the redder an LR pixel, the more the network uses '
    'it for the patch in the yellow frame, which is where before and after differ most in the crop above; the higher '
    'of the two diffusion indices of a pair is that of the network that looks further around.'
)
LEFT_OUT = 'There are no attribution maps'


def show_looks(folder: Path, pairs: Mapping[str, BeforeAfter], before: nn.Module, after: nn.Module, level: int) -> str:
    """The attribution maps of two networks, as HTML.

    Args:
        folder: As for :func:`lora_sr.report.crops.look_at_each`.
        pairs: What a pair is here -> the pair, as that function has found it.
        before: The network that it was given.
        after: The other one.
        level: Of the heading.

    Returns:
        A section with a heading. Where the networks or a pair cannot be attributed a sentence says why.
    """
    title = heading('What the networks look at', level)
    parameters = sum(parameter.numel() for parameter in before.parameters())
    if parameters > MOST_PARAMETERS:
        return title + paragraph(
            f'{LEFT_OUT}, which take long for a network of {parameters:,} parameters: lora-sr attribution makes them.'
        )
    try:
        networks = {name: open_to_attribute(name, network) for name, network in ((BEFORE, before), (AFTER, after))}
    except InputError as error:
        return title + paragraph(f'{LEFT_OUT}. {error}')
    parts = [title, paragraph(INTRODUCTION)]
    for kind, pair in pairs.items():
        name = heading(f'{pair.name}, {kind}', level + 1)
        try:
            found = attribute(networks, read_image(folder / LR / f'{pair.name}.png'), _frame(pair), STEPS)
        except InputError as error:
            shown = paragraph(f'{LEFT_OUT} of this pair. {error}')
        else:
            shown = _maps(pair.name, found)
        parts.append(f'<section class="look">{name}{shown}</section>')
    return '\n'.join(parts)


def _frame(pair: BeforeAfter) -> Window:
    """The window of a pair: where in its crop before and after differ most; in pixels of the whole output."""
    crop = pair.crop
    x, y, side = choose_window([crop.before, crop.after], min(SIDE, *crop.hr.shape[:2]), margin=0)
    return crop.left + x, crop.top + y, side


def _maps(name: str, found: Attributions) -> str:
    """The part that is looked at, and the two maps over it, each with the window framed."""
    left, top, width, height = found.context
    x, y, side = found.window
    inner_x, inner_y, _ = found.inner_window
    across, down = (100 / (length * found.scale) for length in (width, height))
    framed = (
        f'<span style="left:{inner_x * across:.3f}%;top:{inner_y * down:.3f}%;'
        f'width:{side * across:.3f}%;height:{side * down:.3f}%"></span>'
    )

    def image(pixels: np.ndarray, kind: str, caption: str) -> str:
        size, alt = f'width="{width}" height="{height}"', text(f'{kind}, pair {name}: {caption}')
        shown = f'<div class="map"><img {size} src="{data_url(pixels)}" alt="{alt}">{framed}</div>'
        return f'<figure>{shown}<figcaption>{text(kind)}: {text(caption)}</figcaption></figure>'

    indices = found.indices
    images = [image(found.part, 'LR image', 'the patch in the frame')]
    for kind, network in (('Before', BEFORE), ('After', AFTER)):
        laid_over = lay_over(found.part, found.maps[network])
        images.append(image(laid_over, kind, f'diffusion index {indices[network]:.2f}'))
    told = (
        f'Shown are LR pixels {extent(left, top, width, height)}. '
        f'The patch has the pixels {extent(x, y, side, side)} of the output.'
    )
    return paragraph(told, 'note') + f'<div class="maps">{"".join(images)}</div>'
