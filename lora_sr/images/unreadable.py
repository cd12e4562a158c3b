"""What ends the reading of an image with a sentence."""

from __future__ import annotations


class UnreadableImage(ValueError):
    """What is wrong with an image: the rest of a sentence that begins with the name of its file."""
