"""Sections of option files that describe a network, before anything is built of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_sr.archs import AdaptSR

BY_FILE = 'spandrel'  # the type of a network that is described by the file of its weights


def base_section(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of the network that an AdaptSR adapts; of any other network its own."""
    base = section.get('base')
    return base if section.get('type') == AdaptSR.__name__ and isinstance(base, Mapping) else section


def names_file(section: object) -> bool:
    """Whether a section names the file of its weights, itself or as the base that it adapts."""
    return isinstance(section, Mapping) and base_section(section).get('type') == BY_FILE
