"""What models are fed: images of whole numbers, raw ones among them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from lora_sr.basicsr.integer_images import with_floats
from lora_sr.basicsr.options.schema import RAW_LR, RAW_PAIRED
from lora_sr.basicsr.patches.tools import is_patch, patch
from lora_sr.data.lmdb_store import RawDatabase, RawView, is_raw

PATCH = 400  # side of the GT patches of a RealESRGANDataset, fixed in its code


def patch_feed_data() -> None:
    """``feed_data`` knows images of floating point alone, of four times the bytes of what was read.

    Every model's, also of one that somebody else defines later, is given floating point: made of whole numbers on the
    model's device. Those of a data set of somebody else's are left to the model that it is for.
    """
    from basicsr.models.base_model import BaseModel

    if is_patch(BaseModel.__init_subclass__):
        return

    @patch
    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        super(BaseModel, cls).__init_subclass__(**kwargs)
        _feed_floats(cls)

    BaseModel.__init_subclass__ = classmethod(__init_subclass__)
    models = list(BaseModel.__subclasses__())
    while models:
        models += models[0].__subclasses__()
        _feed_floats(models.pop(0))


def _feed_floats(model: Any) -> None:
    original = vars(model).get('feed_data')
    if original is None or is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def feed_data(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        fed = with_floats(data, self.device) if isinstance(data, Mapping) and _may_be_raw(self.opt) else data
        return original(self, fed, *args, **kwargs)

    model.feed_data = feed_data


def _may_be_raw(opt: Mapping[str, Any]) -> bool:
    """Whether a data set of these options gives whole numbers for a model to be fed; without any nobody can tell."""
    sections = (opt.get('datasets') or {}).values()
    kinds = [str(section.get('type')) for section in sections if isinstance(section, Mapping)]
    return not kinds or any(kind.startswith((RAW_PAIRED, RAW_LR)) for kind in kinds)


def patch_cuda_prefetcher() -> None:
    """``CUDAPrefetcher`` gives a batch to another stream than the one that its memory belongs to, and does not say so.

    Once Python has let go of a batch, the next copy may write over what the training still reads. Here whole numbers
    become floating point on the copying stream, as well.
    """
    from basicsr.data.prefetch_dataloader import CUDAPrefetcher

    if is_patch(CUDAPrefetcher.preload):
        return
    preload_batch, next_batch = CUDAPrefetcher.preload, CUDAPrefetcher.next

    @patch
    @functools.wraps(preload_batch)
    def preload(self: Any) -> None:
        preload_batch(self)
        if self.batch is not None and _may_be_raw(self.opt):
            with torch.cuda.stream(self.stream):
                self.batch = with_floats(self.batch, self.device)

    @patch
    @functools.wraps(next_batch)
    def next(self: Any) -> Any:
        batch = next_batch(self)
        for value in (batch or {}).values():
            if torch.is_tensor(value) and value.is_cuda:
                value.record_stream(torch.cuda.current_stream())
        return batch

    CUDAPrefetcher.preload, CUDAPrefetcher.next = preload, next


def patch_realesrgan_dataset() -> None:
    """``RealESRGANDataset`` decodes, turns and converts a whole image, of which it then cuts a patch.

    Of a raw database the patch alone is read: drawn as the original draws it, and given to it as what it has cut.
    """
    from basicsr.data import realesrgan_dataset

    dataset = realesrgan_dataset.RealESRGANDataset
    if is_patch(dataset.__init__):
        return
    set_up = dataset.__init__

    @patch
    @functools.wraps(set_up)
    def __init__(self: Any, opt: dict[str, Any]) -> None:
        set_up(self, opt)
        if opt['io_backend']['type'] == 'lmdb' and is_raw(opt['dataroot_gt']):
            self.file_client = RawClient(opt['dataroot_gt'])

    dataset.__init__ = __init__
    realesrgan_dataset.imfrombytes = _or_raw(realesrgan_dataset.imfrombytes, lambda image, float32: image)
    realesrgan_dataset.augment = _or_raw(realesrgan_dataset.augment, _drawn_patch)


class RawClient:
    """Raw images, as a ``FileClient`` has the files of others."""

    def __init__(self, root: str):
        self.database = RawDatabase(root)

    def get(self, path: str, client_key: str = 'default') -> RawView:
        """The image of that key."""
        return self.database.view(path)


def _or_raw(original: Any, of_raw: Callable[..., Any]) -> Any:
    @patch
    @functools.wraps(original)
    def patched(image: Any, *args: Any, **kwargs: Any) -> Any:
        return (of_raw if isinstance(image, RawView) else original)(image, *args, **kwargs)

    return patched


def _drawn_patch(image: RawView, hflip: bool, rotation: bool) -> np.ndarray:
    """What ``augment`` and the crop behind it make of an image: the same draws, and float32 BGR of the patch alone.

    Where a side is shorter than a patch it stays so, for the original to pad.
    """
    is_mirrored = hflip and random.random() < 0.5
    is_upside_down = rotation and random.random() < 0.5
    is_transposed = rotation and random.random() < 0.5
    # What is cut of the turned image, as rows and columns of the one that is stored.
    sides = image.shape[1::-1] if is_transposed else image.shape[:2]
    starts = [0, 0]
    if max(sides) > PATCH:
        starts = [random.randint(0, max(length - PATCH, 0)) for length in sides]
    cuts = [slice(start, min(start + PATCH, length)) for start, length in zip(starts, sides)]
    rows, columns = reversed(cuts) if is_transposed else cuts
    if is_upside_down:
        rows = slice(image.shape[0] - rows.stop, image.shape[0] - rows.start)
    if is_mirrored:
        columns = slice(image.shape[1] - columns.stop, image.shape[1] - columns.start)
    pixels = image[rows, columns][:: -1 if is_upside_down else 1, :: -1 if is_mirrored else 1, ::-1]
    pixels = pixels.transpose(1, 0, 2) if is_transposed else pixels
    return np.ascontiguousarray(pixels).astype(np.float32) / (65535.0 if pixels.dtype == np.uint16 else 255.0)
