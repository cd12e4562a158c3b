"""From photographs to a better network, by one call: see :func:`lora_sr.adapt.adapting.adapt`."""
