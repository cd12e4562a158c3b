"""What tells that an adapter is not for a base, and in which layers they differ."""

from __future__ import annotations

from collections.abc import Mapping

from lora_sr.errors import InputError

SHOWN_MISFITS = 3  # of the layers that do not fit


class Misfit(InputError):
    """An adapter that is not for a base; the message is the part of a sentence that says why."""


class Differs(Exception):
    """How a layer differs from that of a base, as part of a sentence."""


def describe_differing(differing: Mapping[str, str], count: int) -> str:
    """How many of ``count`` layers differ, and the first of them, given by name -> how."""
    colon = ':' if len(differing) <= SHOWN_MISFITS else ', e.g.'
    return f'{len(differing)} of its {count} layers differ{colon} {"; ".join(list(differing.values())[:SHOWN_MISFITS])}'
