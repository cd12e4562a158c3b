"""Images to the LMDB pairs that BasicSR reads, and MATLAB's bicubic."""

from lora_sr.data.bicubic import bicubic_downscale, bicubic_upscale
from lora_sr.data.lmdb_store import read_meta_info
from lora_sr.data.prepare import prepare_databases

__all__ = ['bicubic_downscale', 'bicubic_upscale', 'prepare_databases', 'read_meta_info']
