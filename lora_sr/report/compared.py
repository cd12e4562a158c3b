"""A table that ``lora-sr compare`` has written, as a part of a page."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sr.errors import InputError
from lora_sr.files import check_regular
from lora_sr.report.markup import paragraph, table
from lora_sr.report.tables import COLUMNS, TABLE_SUFFIXES

CELL = re.compile(r'(?<!\\)\|')
QUALITY = re.compile(r'(.+)_(psnr|ssim)_(y|rgb)')
BY_KEY = {column.key: column for column in COLUMNS.values()}


class ComparedPart:
    """What a page says of a comparison: its table.

    Args:
        file: The table, ``.md``, ``.csv`` or ``.json``.

    Raises:
        InputError: It cannot be read, or is none.
    """

    def __init__(self, file: Path):
        self.file = file
        check_regular(file, 'the table')
        try:
            content = file.read_text('utf-8')
            read = dict(zip(TABLE_SUFFIXES, (_of_markdown, _of_csv, _of_json)))[file.suffix]
            self.head, self.rows, self.notes = read(content)
        except OSError as error:
            raise InputError(f'The table {file} cannot be read: {error.strerror}.') from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error):
            raise InputError(f'{file} must be a table of `lora-sr compare`, got another file.') from None
        self.curves: dict[str, dict[int, float]] = {}

    @property
    def place(self) -> Path:
        """Where it is."""
        return self.file

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return f'Comparison {self.file.name}'

    def html(self, level: int) -> str:
        """All of it."""
        return '\n'.join([table('Networks, side by side', self.head, self.rows), *map(paragraph, self.notes)])


Table = tuple[list[str], list[list[str]], list[str]]  # its head, its rows, and what is said below


def _of_markdown(content: str) -> Table:
    lines = content.splitlines()
    cells = [_cells(line) for line in lines if line.startswith('|')]
    head, rule, *rows = cells
    if set(''.join(rule)) != set('-:') or not rows or any(len(row) != len(head) for row in rows):
        raise ValueError
    return head, rows, [html.unescape(line.strip()) for line in lines if line.strip() and not line.startswith('|')]


def _cells(line: str) -> list[str]:
    return [html.unescape(cell.strip().replace('\\|', '|')) for cell in CELL.split(line.strip())[1:-1]]


def _of_csv(content: str) -> Table:
    return _of_records(list(csv.DictReader(io.StringIO(content))), [])


def _of_json(content: str) -> Table:
    found = json.loads(content)
    notes = [f'x{found["scale"]}: {found["scale"]} pixels of border left out.']
    notes += [f'Runtime and memory: {found["conditions"]}.'] if found.get('conditions') else []
    notes += [f'NTIRE score: baseline {found["baseline"]}, lower is better.'] if found.get('baseline') else []
    return _of_records(found['methods'], notes)


def _of_records(records: list[Any], notes: list[str]) -> Table:
    if not records:
        raise ValueError
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if key != 'name']
    head = ['', *map(_heading, keys)]
    return head, [[str(record['name']), *(_shown(record, key) for key in keys)] for record in records], notes


def _heading(key: str) -> str:
    if key in BY_KEY:
        return BY_KEY[key].heading
    found = QUALITY.fullmatch(key)
    return f'{found[1]}, {found[2].upper()} ({found[3].upper()})' if found else key


def _shown(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None or value == '':
        return '-'
    number = float(value)
    if key not in BY_KEY:
        return f'{number:.4f}'
    column = BY_KEY[key]
    return column.show(int(number) if number.is_integer() and column.factor == 1 else number / column.factor)
