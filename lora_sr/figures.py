"""Figures of matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from lora_sr.errors import InputError, printable, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = ('.png', '.svg', '.pdf')


def figure_class() -> type[Figure]:
    """The class of a figure without a window.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('Figures are drawn by matplotlib, which is not installed: pip install matplotlib.') from None
    except ValueError as error:  # MPLBACKEND names one that there is not
        raise InputError(f'matplotlib cannot be imported: {shown(str(error), 200)}') from None
    return Figure


def label(name: str) -> str:
    """A name as it is: to matplotlib what is between two dollars is a formula, and an underscore in front hides it."""
    text = printable(name).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def encode_figure(figure: Figure, suffix: str, dpi: int | None = None) -> bytes:
    """The bytes of a file with a figure, the same each time.

    Args:
        figure: What is drawn.
        suffix: One of ``SUFFIXES``, which says how.
        dpi: Dots per inch of PNG; those of the figure if None.
    """
    import matplotlib

    dates = {'.svg': {'Date': None}, '.pdf': {'CreationDate': None}}
    data = io.BytesIO()
    with matplotlib.rc_context({'svg.hashsalt': 'lora_sr'}):
        figure.savefig(data, format=suffix[1:], dpi=dpi or 'figure', metadata=dates.get(suffix))
    return data.getvalue()
