"""Pairs of images from several roots."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lora_sr.basicsr.datasets import PAIRED_KEYS, paired_roots
from lora_sr.basicsr.patches.tools import is_defective, patch

SUFFIX = '.lmdb'  # of each database


def patch_paired_image_dataset() -> None:
    """``PairedImageDataset`` has one root of GT and one of LR images: what trains together has to be copied into one.

    With lists of roots it has the pairs of each in turn; with one root all is BasicSR's own.
    """
    from basicsr.data.paired_image_dataset import PairedImageDataset

    original = PairedImageDataset.__init__
    if not is_defective(original, 'dataroot_gt', without='isinstance'):
        return

    @patch
    @functools.wraps(original)
    def __init__(self: Any, opt: dict[str, Any]) -> None:
        if any(isinstance(opt.get(key), (list, tuple)) for key in PAIRED_KEYS):
            _set_up_roots(self, opt, original)
        else:
            original(self, opt)

    PairedImageDataset.__init__ = __init__


def _set_up_roots(dataset: Any, opt: dict[str, Any], set_up: Callable[[Any, dict[str, Any]], None]) -> None:
    roots, of_roots = paired_roots(opt), {}
    is_database = opt['io_backend']['type'] == 'lmdb'
    for gt, lq, names in dict.fromkeys(roots):
        section = {**opt, 'dataroot_gt': gt, 'dataroot_lq': lq, 'meta_info_file': names}
        set_up(dataset, {**section, 'io_backend': dict(opt['io_backend'])})
        paths = dataset.paths
        if is_database:  # where two may have a key in common
            paths = [{'gt_path': f'{gt}/{path["gt_path"]}', 'lq_path': f'{lq}/{path["lq_path"]}'} for path in paths]
        of_roots[gt, lq, names] = paths
    dataset.opt, dataset.io_backend_opt = opt, dict(opt['io_backend'])
    dataset.gt_folder, dataset.lq_folder = opt['dataroot_gt'], opt['dataroot_lq']
    dataset.paths = [path for pair in roots for path in of_roots[pair]]
    if is_database:
        dataset.file_client = Databases(list(dict.fromkeys(root for pair in roots for root in pair[:2])))


class Databases:
    """Reads several databases, as a ``FileClient`` reads one; each process opens them for itself.

    Args:
        roots: Their folders, which end in ``.lmdb``.
    """

    def __init__(self, roots: list[str]):
        self.roots = roots
        self.client: Any = None

    def get(self, path: str, client_key: str = 'default') -> bytes | None:
        """The value at ``ROOT/KEY``; ``None`` if there is none. A key has no full stop."""
        if self.client is None:
            from basicsr.utils import FileClient

            self.client = FileClient('lmdb', db_paths=self.roots, client_keys=self.roots)
        root, _, key = path.rpartition(f'{SUFFIX}/')
        value: bytes | None = self.client.get(key, root + SUFFIX)
        return value
