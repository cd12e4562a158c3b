"""What an adaptation has come to, in numbers and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_sr.adapt.held import Measured

LEAST_GAIN = 0.02  # dB: less is within what the choice of rate, iteration and strength among noise gives
HALF = 0.5


@dataclass(frozen=True)
class Outcome:
    """What :func:`lora_sr.adapt.adapting.adapt` has come to.

    All PSNR are in dB on Y, means over the pairs that were held back. Learning rate, iteration and strength were chosen
    on the same pairs.

    Attributes:
        held: Number of pairs that were held back.
        start: The network as it was.
        bicubic: Bicubic interpolation.
        by_strength: {strength: what the network with so much of the update has}.
        strength: The one that was chosen: that with the highest PSNR on the camera's images.
        ended: How the training ended, see :class:`lora_sr.adapt.training.Trained`.
    """

    held: int
    start: Measured
    bicubic: Measured
    by_strength: Mapping[float, Measured]
    strength: float
    ended: str

    @classmethod
    def of(cls, steps: Mapping[str, Any]) -> Outcome:
        """That of the steps of ``adapt.json``. Of strengths with one PSNR the lowest is chosen."""
        start = Measured(**steps['start']['start'])
        by_strength = {float(one): Measured(**values) for one, values in steps['strength'].items()} or {0.0: start}
        return cls(
            len(steps['pairs']['held']),
            start,
            Measured(**steps['start']['bicubic']),
            by_strength,
            max(by_strength, key=lambda one: (by_strength[one].camera, -one)),
            steps['training']['ended'],
        )

    @property
    def result(self) -> Measured:
        """What the network has with the chosen strength."""
        return self.by_strength[self.strength]

    @property
    def gain(self) -> float:
        """PSNR gained on the camera's images, in dB."""
        return self.result.camera - self.start.camera

    @property
    def has_gained(self) -> bool:
        """Whether that is at least :data:`LEAST_GAIN`."""
        return self.gain >= LEAST_GAIN

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""

        def numbers(measured: Measured) -> dict[str, float]:
            return {'camera': round(measured.camera, 4), 'clean': round(measured.clean, 4)}

        return {
            'held': self.held,
            'start': numbers(self.start),
            'bicubic': numbers(self.bicubic),
            'by_strength': {f'{strength:g}': numbers(found) for strength, found in self.by_strength.items()},
            'strength': self.strength,
            'gain': round(self.gain, 4),
            'has_gained': self.has_gained,
            'ended': self.ended,
        }

    def __str__(self) -> str:
        pairs = f'{self.held} pair{"s" * (self.held != 1)} held back'
        camera = f'{self.start.camera:.2f} -> {self.result.camera:.2f} dB (bicubic {self.bicubic.camera:.2f})'
        if not self.has_gained:
            return (
                f'Nothing was gained: your camera {camera} on {pairs}. The network stays as it is; no merged network '
                'was written.'
            )
        clean = f'{self.start.clean:.2f} -> {self.result.clean:.2f} dB at strength {self.strength:g}'
        half = self.by_strength.get(HALF)
        if half is not None and self.strength != HALF:
            clean += f', {half.clean:.2f} at {HALF:g}'
        advice = ': keep the base beside it' if self.result.clean < self.start.clean - LEAST_GAIN else ''
        return f'Your camera: {camera}, on {pairs}; bicubic images: {clean}{advice}.'
