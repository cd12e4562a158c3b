"""Finding the images to prepare, pairing HR with LR, and reading them."""

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import cv2
import numpy as np

from lora_sr.data.lmdb_store import PNG_SIGNATURE
from lora_sr.errors import InputError

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
PUBLISHED_HR_FOLDERS = ('DIV2K_train_HR', 'Flickr2K_HR')

_JPEG_MARKER = re.compile(rb'\xff+([^\x00\xff\xd0-\xd7])', re.DOTALL)


@dataclass(frozen=True)
class Source:
    """An HR image, and what stands for it in the databases.

    Attributes:
        key: the file's name without its extension, with `_` for anything but ASCII letters, digits, `-` and `_`.
        hr: the HR file.
        lr: {scale: LR file}; a scale that is missing is to be made by bicubic.
    """

    key: str
    hr: Path
    lr: dict


def find_sources(folders: Sequence, scales: Sequence[int], lr_folders: Optional[Sequence] = None) -> list:
    """Find the HR images of some folders, and the LR image of each where there is one.

    A folder holds images (its sub-folders are not searched), or it is the root of the published DIV2K or Flickr2K,
    which holds `DIV2K_train_HR` or `Flickr2K_HR`. Beside a folder `NAME_HR`, `NAME_LR_bicubic/X4` is taken for its LR
    images at scale 4, as DIV2K and Flickr2K have it. The LR image of `0001.png` is `0001x4.png` or `0001.png`, of
    any image type.

    Args:
        folders: HR folders.
        scales: the scales that LR images are wanted for.
        lr_folders: the LR folder of each HR folder, in the same order, in place of those found by name. With one scale
            it may hold the images themselves; otherwise it holds a folder `X2`, `X3`, ... for each scale.

    Returns:
        A `Source` for each HR image, sorted by key.

    Raises:
        InputError: if a folder is missing or has no images, HR and LR do not pair, or two files make the same key.
    """
    if lr_folders and len(lr_folders) != len(folders):
        raise InputError(
            f'--lr: {len(lr_folders)} LR folders were given for {len(folders)} HR folders, where one for '
            'each, in the same order, is right.'
        )
    sources = {}
    for number, folder in enumerate(folders):
        for hr_folder in _hr_folders(Path(folder)):
            lr_of_scale = {}
            for scale in scales:
                lr_folder = (
                    _given_lr_folder(Path(lr_folders[number]), scale, len(scales))
                    if lr_folders
                    else _published_lr_folder(hr_folder, scale)
                )
                if lr_folder:
                    lr_of_scale[scale] = _pair(hr_folder, lr_folder, scale)
            for path in _images(hr_folder):
                key = re.sub('[^A-Za-z0-9_-]', '_', path.stem)
                if key in sources:
                    raise InputError(
                        f'{sources[key].hr} and {path} would have the same key, "{key}", in the database: '
                        'rename one of them.'
                    )
                sources[key] = Source(key, path, {scale: lr[path] for scale, lr in lr_of_scale.items()})
    return [sources[key] for key in sorted(sources)]


def read_image(path: Path) -> np.ndarray:
    """Read an 8-bit image as it is stored: an EXIF orientation is not applied, as in BasicSR's and MATLAB's readers.

    Returns:
        uint8 of shape (height, width, 3), BGR, 0 to 255. Grey becomes three equal channels, which is what BasicSR's
        loader makes of it, and an alpha channel that is opaque everywhere is left out.

    Raises:
        InputError: if the file cannot be read, is damaged or cut short, is not 8-bit, or is transparent somewhere.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f'{path} cannot be read ({error.strerror}).') from error
    image = None
    if data and not _is_damaged(data):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:  # an image beyond OpenCV's limit on pixels
            pass
    if image is None:
        raise InputError(f'{path} is damaged or is not an image: replace it or take it out of its folder.')
    if image.dtype != np.uint8:
        raise InputError(f'{path} has values of type {image.dtype}, where 8-bit images are right: convert it first.')
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if image.shape[2] == 4:
        if image[:, :, 3].min() < 255:
            raise InputError(f'{path} is transparent in places, where opaque images are right: flatten it first.')
        image = np.ascontiguousarray(image[:, :, :3])
    return image


def _hr_folders(folder: Path) -> list:
    if not folder.is_dir():
        raise InputError(f'{folder} is not a folder, where a folder of HR images is right.')
    if _images(folder):
        return [folder]
    published = [folder / name for name in PUBLISHED_HR_FOLDERS if (folder / name).is_dir()]
    for hr_folder in published:
        if not _images(hr_folder):
            raise InputError(f'{hr_folder} has no images ({", ".join(IMAGE_SUFFIXES)}).')
    if not published:
        raise InputError(
            f'{folder} has no images ({", ".join(IMAGE_SUFFIXES)}), nor is it the root of DIV2K or '
            f'Flickr2K, with a folder {" or ".join(PUBLISHED_HR_FOLDERS)}; sub-folders are not searched.'
        )
    return published


def _given_lr_folder(folder: Path, scale: int, scales: int) -> Path:
    for candidate in (folder / f'X{scale}', folder / f'x{scale}'):
        if candidate.is_dir():
            return candidate
    if scales > 1 or not folder.is_dir():
        raise InputError(
            f'--lr: {folder / f"X{scale}"} is not a folder, where the LR images of scale {scale} are expected.'
        )
    return folder


def _published_lr_folder(hr_folder: Path, scale: int) -> Optional[Path]:
    hr_folder = Path(os.path.abspath(hr_folder))  # `.` has no name
    if not hr_folder.name.endswith('_HR'):
        return None
    lr_folder = hr_folder.parent / f'{hr_folder.name[: -len("_HR")]}_LR_bicubic' / f'X{scale}'
    return lr_folder if lr_folder.is_dir() else None


def _pair(hr_folder: Path, lr_folder: Path, scale: int) -> dict:
    """{HR file: its LR file}, one to one."""
    lr_of_stem = {path.stem: path for path in _images(lr_folder)}
    unused = set(lr_of_stem)
    pairs, lonely = {}, []
    for path in _images(hr_folder):
        stem = f'{path.stem}x{scale}' if f'{path.stem}x{scale}' in lr_of_stem else path.stem
        if stem in unused:
            unused.remove(stem)
            pairs[path] = lr_of_stem[stem]
        else:
            lonely.append(path.name)
    if lonely:
        raise InputError(
            f'{lr_folder} has no LR image for {len(lonely)} of the HR images in {hr_folder} '
            f'({_some(lonely)}): `NAMEx{scale}` or `NAME` is right.'
        )
    if unused:
        raise InputError(
            f'{lr_folder} has {len(unused)} images without an HR image in {hr_folder} '
            f'({_some(sorted(lr_of_stem[stem].name for stem in unused))}).'
        )
    return pairs


def _images(folder: Path) -> list:
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.') and path.is_file()
        )
    except OSError as error:
        raise InputError(f'{folder} cannot be read ({error.strerror}).') from error


def _some(names: list) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _is_damaged(data: bytes) -> bool:
    """Whether a PNG or JPEG file is cut short, or a PNG's checksums are wrong.

    OpenCV fills what is missing with grey or black and says so on stderr only; such an image must not be trained on.
    """
    view = memoryview(data)
    if data.startswith(PNG_SIGNATURE):
        position = len(PNG_SIGNATURE)
        while position < len(data):
            end = position + 12 + int.from_bytes(view[position : position + 4], 'big')
            name = bytes(view[position + 4 : position + 8])
            # Only chunks that make the picture count: their names begin with a capital.
            critical = name[:1].isupper()
            if (
                end > len(data)
                or critical
                and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], 'big')
            ):
                return True
            if name == b'IEND':
                return False
            position = end
        return True
    if data.startswith(b'\xff\xd8'):
        # From marker to marker: a segment's own bytes are skipped, for they may hold a thumbnail with its own end.
        position = 2
        while True:
            match = _JPEG_MARKER.search(data, position)
            if not match:
                return True
            if match[1] == b'\xd9':
                return False
            position = match.end() + int.from_bytes(view[match.end() : match.end() + 2], 'big')
    return False
