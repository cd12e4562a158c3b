"""Datasets of raw databases: patches cut straight out of memory maps, as whole numbers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils import bgr2ycbcr, img2tensor
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize

from lora_sr.basicsr.color_augmentations import ColorAugmentation
from lora_sr.basicsr.datasets import PAIRED_KEYS, paired_roots, roots_of
from lora_sr.basicsr.integer_images import to_planes
from lora_sr.data.lmdb_store import RawDatabase, RawView
from lora_sr.errors import InputError

Sample = dict[str, Any]


class Roots:
    """The raw databases that one key of a section names, whose images go into the same batches.

    Args:
        roots: Their folders; one may stand there several times.

    Attributes:
        is_deep: Whether all images are given with 16 bits, as they are where any has them.

    Raises:
        InputError: One is no raw database, or images have different numbers of channels.
    """

    def __init__(self, roots: list[str]):
        self.databases = {root: RawDatabase(os.path.expanduser(root)) for root in roots}
        images = [(image, root) for root, database in self.databases.items() for image in database.images.values()]
        channels = {image.shape[2]: root for image, root in images}
        if len(channels) > 1:
            (first, root), (second, other) = list(channels.items())[:2]
            raise InputError(
                f'the images of all roots must have the same number of channels, got {first} in {root} and {second} in '
                f'{other}'
            )
        self.channels = next(iter(channels), 3)
        self.is_deep = any(image.dtype == 'uint16' for image, _ in images)

    def view(self, root: str, key: str) -> RawView:
        """An image, see :meth:`RawDatabase.view`."""
        return self.databases[root].view(key)

    def in_type(self, patch: np.ndarray) -> np.ndarray:
        """A patch in the type of all: 257 of 65535 is 1 of 255, also once it is divided and rounded."""
        return patch.astype(np.uint16) * np.uint16(257) if self.is_deep and patch.dtype == np.uint8 else patch


class Taught:
    """What a teacher made of the LR images of a dataset, see :mod:`lora_sr.basicsr.precompute`."""

    lq: Roots
    taught: dict[str, RawDatabase] | None = None

    def teach(self, outputs: dict[str, str]) -> None:
        """Give ``taught`` with each sample: the patch of the teacher's output, uint16 from -0.5 to 1.5.

        Args:
            outputs: {root of LR images: raw database of the outputs for them}.
        """
        self.taught = {root: RawDatabase(path) for root, path in outputs.items()}


class RawPairedImageDataset(Taught, Dataset):
    """Pairs of GT and LR images, as a ``PairedImageDataset`` gives them, from databases of ``lora-sr prepare --raw``.

    Keys, order, crops, flips and rotations are those of a ``PairedImageDataset`` on PNGs of the same whole images, for
    the same seed. Of an image no more than the rows of the patch are read, and nothing is decoded.

    Args:
        opt: The section of the option file, as of a ``PairedImageDataset`` with ``io_backend: {type: lmdb}``; its
            roots are raw databases, one or a list each. ``color: y``, ``mean`` and ``std`` make batches of float32.

    Each item is ``{'lq', 'gt', 'lq_path', 'gt_path'}``: RGB of shape (C, H, W) in the type of the database, uint8 or
    uint16 (always that with ``blend_prob``), which the model turns into float32 in [0, 1] on its device; and the names
    of the images.

    Raises:
        InputError: A root is no raw database, two that pair have other keys, other than three channels are to be
            permuted, or images of different channels to be blended.
    """

    def __init__(self, opt: dict[str, Any]):
        super().__init__()
        self.opt = opt
        self.mean, self.std = opt.get('mean'), opt.get('std')
        roots = paired_roots(opt)
        self.gt, self.lq = Roots([gt for gt, _, _ in roots]), Roots([lq for _, lq, _ in roots])
        self.colors = ColorAugmentation(opt, self.lq.channels, self.gt.channels)
        for images in (self.gt, self.lq):
            images.is_deep |= self.colors.needs_16_bits
        self.images: list[tuple[str, str, str]] = []  # root of GT, root of LR, key
        self.paths: list[dict[str, str]] = []
        several = any(isinstance(opt.get(key), (list, tuple)) for key in PAIRED_KEYS)
        for gt, lq, _ in roots:
            keys = sorted(self.gt.databases[gt].images)
            if keys != sorted(self.lq.databases[lq].images):
                raise InputError(f'{gt} and {lq} must have the same keys, got others')
            for key in keys:
                self.images.append((gt, lq, key))
                names = (f'{lq}/{key}', f'{gt}/{key}') if several else (key, key)
                self.paths.append(dict(zip(('lq_path', 'gt_path'), names)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        gt_root, lq_root, key = self.images[index]
        names: Sample = dict(self.paths[index])
        scale = self.opt['scale']
        whole_gt, whole_lq = self.gt.view(gt_root, key), self.lq.view(lq_root, key)
        if self.opt['phase'] == 'train':
            large = [whole_gt, *([self.taught[lq_root].view(key)] if self.taught else [])]
            large, lq = paired_random_crop(large, whole_lq, self.opt['gt_size'], scale, names['gt_path'])
            patches = [*large, lq] if self.taught else [large, lq]
            turned = augment(patches, self.opt['use_hflip'], self.opt['use_rot'])
            gt, *taught, lq = turned
            (gt, lq), taught = self.colors([self.gt.in_type(gt), self.lq.in_type(lq)], taught)
            if taught:
                names['taught'] = to_planes(taught[0])
        else:
            lq = whole_lq[:, :]
            gt = whole_gt[: lq.shape[0] * scale, : lq.shape[1] * scale]
            gt, lq = self.gt.in_type(gt), self.lq.in_type(lq)
        return {'lq': self._tensor(lq), 'gt': self._tensor(gt), **names}

    def _tensor(self, image: np.ndarray) -> Tensor:
        if self.opt.get('color') != 'y' and self.mean is None and self.std is None:
            return to_planes(image)
        # As BasicSR computes it, in BGR.
        floats = image[:, :, ::-1].astype(np.float32) / (65535.0 if image.dtype == np.uint16 else 255.0)
        if self.opt.get('color') == 'y':
            floats = bgr2ycbcr(floats, y_only=True)[..., None]
        tensor: Tensor = img2tensor(floats, bgr2rgb=True, float32=True)
        if self.mean is not None or self.std is not None:
            normalize(tensor, self.mean, self.std, inplace=True)
        return tensor


class RawLRImageDataset(Taught, Dataset):
    """Random patches of LR images, as an ``LRImageDataset`` gives them, from databases of ``lora-sr prepare --raw``.

    Args:
        opt: The section of the option file, as of an ``LRImageDataset`` with ``io_backend: {type: lmdb}``; its roots
            are raw databases.

    Each item is ``{'lq', 'lq_path'}``: RGB of shape (C, lq_size, lq_size) in the type of the database, uint8 or uint16
    (always that with ``blend_prob``), which the model turns into float32 in [0, 1] on its device; and the image's name.

    Raises:
        InputError: A root is no raw database, or other than three channels are to be permuted.
    """

    def __init__(self, opt: dict[str, Any]):
        super().__init__()
        self.opt = opt
        roots = roots_of(opt['dataroot_lq'])
        self.lq = Roots(roots)
        self.colors = ColorAugmentation(opt, self.lq.channels)
        self.lq.is_deep |= self.colors.needs_16_bits
        self.paths = [(root, key) for root in roots for key in self.lq.databases[root].images]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        root, key = self.paths[index]
        image = self.lq.view(root, key)
        size = int(self.opt['lq_size'])
        top, left = (np.random.randint(length - size + 1) for length in image.shape[:2])
        patches = [image[top : top + size, left : left + size]]
        if self.taught:
            large, scale = self.taught[root].view(key), int(self.opt['scale'])
            patches.append(large[scale * top : scale * (top + size), scale * left : scale * (left + size)])
        turned = augment(patches, self.opt['use_hflip'], self.opt['use_rot'])
        patch, *taught = turned if self.taught else [turned]
        (patch,), taught = self.colors([self.lq.in_type(patch)], taught)
        sample = {'lq': to_planes(patch), 'lq_path': key}
        return {**sample, 'taught': to_planes(taught[0])} if taught else sample
