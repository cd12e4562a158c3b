"""From photographs to a better network, by one call."""

from lora_sr.adapt.adapting import Adaptation, adapt
from lora_sr.adapt.images import Images
from lora_sr.adapt.outcome import Outcome

__all__ = ['Adaptation', 'Images', 'Outcome', 'adapt']
