"""Whole numbers that are written as floats."""

from __future__ import annotations

from typing import Any

from lora_sr.basicsr.options import schema


def make_whole(opt: dict) -> None:
    """Write whole numbers as such, in place, where these are wanted: 1e5 and 4.0 are floats, which index nothing."""
    for name, entries in schema.SECTIONS.items():
        for section in _sections(opt, name.split('.') if name else []):
            for key, value in section.items():
                entry = entries.get(key)
                if entry is not None and _is_whole(entry.kind.json):
                    section[key] = [_whole(one) for one in value] if isinstance(value, list) else _whole(value)


def _sections(section: Any, names: list[str]) -> list[dict]:
    if not isinstance(section, dict):
        return []
    if not names:
        return [section]
    inner = section.values() if names[0] == '*' else [section.get(names[0])]
    return [found for one in inner for found in _sections(one, names[1:])]


def _is_whole(json: dict) -> bool:
    branches = [*json.get('anyOf', ()), *([json['items']] if 'items' in json else [])]
    return json.get('type') == 'integer' or any(map(_is_whole, branches))


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
