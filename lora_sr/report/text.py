"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def align(table: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of cells as lines, with columns of equal width: those in ``left`` flush left, all others flush right."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = (
        '  '.join(f'{cell:{"<" if index in left else ">"}{widths[index]}}' for index, cell in enumerate(row))
        for row in table
    )
    return '\n'.join(line.rstrip() for line in lines)
