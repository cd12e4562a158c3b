"""Roots of datasets, and LR images without ground truth, for a teacher that says what they look like enlarged."""

from __future__ import annotations

from typing import Any

import numpy as np
from basicsr.data.data_util import paths_from_folder, paths_from_lmdb
from basicsr.data.transforms import augment
from basicsr.utils import FileClient, imfrombytes, img2tensor
from torch import Tensor
from torch.utils.data import Dataset

from lora_sr.errors import InputError

PAIRED_KEYS = ('dataroot_gt', 'dataroot_lq', 'meta_info_file')  # of a PairedImageDataset: one of each, or lists


def roots_of(value: Any) -> list[Any]:
    """The folders or databases that an option ``dataroot_…`` names, one or a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def paired_roots(opt: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """The roots of a PairedImageDataset, pair by pair.

    Args:
        opt: Its section. ``dataroot_gt`` and ``dataroot_lq`` are one root or a list each, which pair by position; one
            ``meta_info_file`` is for all of them, a list of these has one for each, or ``None``.

    Returns:
        (root of GT, root of LR, list of names or ``None``) of each pair.

    Raises:
        InputError: The lists are of different lengths.
    """
    gt, lq, names = roots_of(opt['dataroot_gt']), roots_of(opt['dataroot_lq']), opt.get('meta_info_file')
    names = roots_of(names) if isinstance(names, (list, tuple)) else [names] * len(gt)
    for key, given in (('dataroot_lq', lq), ('meta_info_file', names)):
        if len(given) != len(gt):
            raise InputError(f'{key} must have one entry for each of the {len(gt)} of dataroot_gt, got {len(given)}')
    return list(zip(gt, lq, names))


class LRImageDataset(Dataset):
    """Random patches of LR images, from several folders or databases at once. No ground truth is needed.

    For distillation from a teacher's output (``train.distill_pixel_opt`` without ``train.pixel_opt``). Any image will
    do: LR images of several scales, since the teacher does not ask how they were made, or photographs as they are.

    Args:
        opt: The section of the option file, in which these keys count:

            - ``dataroot_lq``: a folder or an LMDB, or a list of them; one that stands there several times is drawn
              from as many times as often;
            - ``io_backend``: ``{type: disk}`` or ``{type: lmdb}``;
            - ``lq_size``: side of the square patches, in pixels;
            - ``use_hflip``, ``use_rot``: random flips and rotations by 90 degrees.

    Each item is ``{'lq', 'lq_path'}``: float32 RGB in [0, 1] of shape (3, lq_size, lq_size), and the image's name.
    """

    def __init__(self, opt: dict[str, Any]):
        super().__init__()
        self.opt = opt
        self.backend = dict(opt['io_backend'])
        self.file_client: FileClient | None = None
        roots = roots_of(opt['dataroot_lq'])
        if self.backend['type'] == 'lmdb':
            # Databases are told apart by a key each, and one that stands in the list twice is opened once.
            unique = list(dict.fromkeys(roots))
            self.backend.update(db_paths=unique, client_keys=unique)
            self.paths = [(root, name) for root in roots for name in paths_from_lmdb(root)]
        else:
            self.paths = [('', path) for root in roots for path in sorted(paths_from_folder(root))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if self.file_client is None:  # opened by each worker for itself
            self.file_client = FileClient(self.backend.pop('type'), **self.backend)
        root, name = self.paths[index]
        image = imfrombytes(self.file_client.get(name, root), float32=True)
        size = int(self.opt['lq_size'])
        top, left = (np.random.randint(length - size + 1) for length in image.shape[:2])
        patch = augment(image[top : top + size, left : left + size], self.opt['use_hflip'], self.opt['use_rot'])
        return {'lq': img2tensor(patch, bgr2rgb=True, float32=True), 'lq_path': name}
