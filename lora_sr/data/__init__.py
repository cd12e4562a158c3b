"""Images to the LMDB pairs that BasicSR reads, MATLAB's bicubic and a camera's degradation."""

from lora_sr.data.camera import camera_degradation, camera_seed
from lora_sr.data.lmdb_store import read_meta_info
from lora_sr.data.prepare import prepare_databases
from lora_sr.images.bicubic import bicubic_downscale, bicubic_upscale

__all__ = [
    'bicubic_downscale',
    'bicubic_upscale',
    'camera_degradation',
    'camera_seed',
    'prepare_databases',
    'read_meta_info',
]
