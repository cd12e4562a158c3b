"""Finding the images to prepare, pairing HR with LR, reading them, and naming those that cannot be used."""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lora_sr.errors import InputError, printable
from lora_sr.images.depth import decode_deep, is_deep
from lora_sr.images.formats import MOST_BYTES, SUFFIXES
from lora_sr.images.png import PNG_SIGNATURE

IMAGE_SUFFIXES = (*SUFFIXES, '.ppm', '.pgm')
PUBLISHED_HR_FOLDERS = ('DIV2K_train_HR', 'Flickr2K_HR')
SPLITS = ('train', 'test')

_JPEG_MARKER = re.compile(rb'\xff+([^\x00\xff\xd0-\xd7])', re.DOTALL)


@dataclass(frozen=True)
class Source:
    """An HR image, and what stands for it in the databases.

    Attributes:
        key: the file's name without its extension, with ``_`` for anything but ASCII letters, digits, ``-`` and ``_``.
        hr: the HR file.
        lr: {scale: LR file}; a scale that is missing is to be made by bicubic.
        captured: HR and LR come from a camera, as in RealSR and DRealSR.
    """

    key: str
    hr: Path
    lr: dict[int, Path]
    captured: bool = False


@dataclass(frozen=True)
class _Part:
    """A part of RealSR or DRealSR: its HR and LR folders. The split or the scale is None where no name tells it."""

    dataset: str
    split: str | None
    scale: int | None
    hr: Path
    lr: Path


def find_sources(
    folders: Sequence[str | os.PathLike[str]],
    scales: Sequence[int],
    lr_folders: Sequence[str | os.PathLike[str]] | None = None,
    split: str | None = None,
    misfits: dict[str, str] | None = None,
) -> list[Source]:
    """Find the HR images of some folders, and the LR image of each where there is one.

    A folder holds images (its sub-folders are not searched), or it is the root of the published DIV2K or Flickr2K,
    which holds ``DIV2K_train_HR`` or ``Flickr2K_HR``. Beside a folder ``NAME_HR``, ``NAME_LR_bicubic/X4`` is taken for
    its LR images at scale 4, as DIV2K and Flickr2K have it. The LR image of ``0001.png`` is ``0001x4.png`` or
    ``0001.png``, of any image type.

    Two published sets have HR and LR images from cameras, with other HR images at each scale:

    - RealSR, version 3 (Cai et al., ICCV 2019): ``CAMERA/Train/4/NAME_HR.png`` and, beside it, ``NAME_LR4.png``;
      likewise ``Test`` and the scales 2 and 3. The folder is the root, a camera's folder, or ``4``.
    - DRealSR (Wei et al., ECCV 2020): ``Train_x4/train_HR/NAME_x4.png`` and ``Train_x4/train_LR/NAME_x1.png``, likewise
      ``Test_x4/test_HR`` and ``test_LR``. The folder is ``Train_x4`` or holds it, or it holds ``x4/Train_x4``.

    Args:
        folders: HR folders.
        scales: the scales that LR images are wanted for.
        lr_folders: the LR folder of each HR folder, in the same order, in place of those found by name. With one scale
            it may hold the images themselves; otherwise it holds a folder ``X2``, ``X3``, ... for each scale.
        split: 'train' or 'test': the part of RealSR or DRealSR that is wanted, where a folder has both.
        misfits: gets the images without a partner where others have one, {path: why it cannot be used}. Without it
            they are refused.

    Returns:
        A ``Source`` for each HR image, sorted by key; those among ``misfits`` left out.

    Raises:
        InputError: if a folder is missing or has no images, HR and LR do not pair, two files make the same key, or a
            camera's set is not there as wanted.
    """
    if lr_folders and len(lr_folders) != len(folders):
        raise InputError(
            f'--lr must be an LR folder for each of the {len(folders)} HR folders, in the same order, got '
            f'{len(lr_folders)}.'
        )
    if split not in (None, *SPLITS):
        raise InputError(f'--split must be {" or ".join(SPLITS)}, got {split}.')
    sources: dict[str, Source] = {}
    lonely: dict[str, str] = {}
    for number, folder in enumerate(map(Path, folders)):
        lr_folder = Path(lr_folders[number]) if lr_folders else None
        parts = _captured_parts(folder)
        if parts:
            found = _captured_sources(folder, parts, scales, lr_folder, split, lonely)
        else:
            found = _plain_sources(folder, scales, lr_folder, lonely)
        for source in found:
            if source.key in sources:
                other = sources[source.key].hr
                if source.hr.name == other.name and os.path.samefile(source.hr.parent, other.parent):
                    paths = printable(f'{other.parent} and {source.hr.parent}')
                    raise InputError(f'Each folder of HR images must be given once, got {paths}, which are the same.')
                paths = printable(f'{other} and {source.hr}')
                raise InputError(
                    f'{paths} would have the same key, "{source.key}", in the database: rename one of them.'
                )
            sources[source.key] = source
    if lonely and (misfits is None or not sources):
        raise InputError(name_images(lonely.values(), len(sources) + len(lonely), 'cannot be used'))
    if misfits is not None:
        misfits.update(lonely)
    if split and not any(source.captured for source in sources.values()):
        raise InputError('--split is for RealSR and DRealSR, which have parts, but none of the folders is one of them.')
    return [sources[key] for key in sorted(sources)]


def state_of(sources: Iterable[Source]) -> str:
    """Which files these are, how large, and when they were written."""
    state = []
    for source in sources:
        for path in (source.hr, *source.lr.values()):
            status = path.stat()
            state.append(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)))
    return ''.join(state)


def read_image(path: Path, deep: bool = False) -> np.ndarray:
    """Read an image as it is stored: an EXIF orientation is not applied, as in BasicSR's and MATLAB's readers.

    Args:
        path: the file.
        deep: take PNG and TIFF of 16 bits as well.

    Returns:
        uint8 of shape (height, width, 3), BGR, 0 to 255; of 16 bits uint16, 0 to 65535. Gray becomes three equal
        channels, which is what BasicSR's loader makes of it, and an alpha channel that is opaque everywhere is left
        out.

    Raises:
        InputError: if the file cannot be read, is larger than any image, is damaged or cut short, has values of another
            kind, is transparent somewhere, or needs more memory than there is.
    """
    with memory_errors(path):
        return _read_image(path, deep)


def _read_image(path: Path, deep: bool) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f'{path} must be an image of less than 2 GiB, got {size / (1 << 30):.1f} GiB.')
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f'{path} cannot be read ({error.strerror}).') from error
    image = None if not data or _is_damaged(data) else decode_deep(data, cv2.IMREAD_UNCHANGED)
    if image is None:
        raise InputError(f'{path} is damaged or is not an image: replace it or take it out of its folder.')
    if image.dtype != np.uint8 and not (deep and is_deep(data)):
        kind = '8-bit values, or be a PNG or TIFF of 16-bit values, channels side by side' if deep else '8-bit values'
        raise InputError(f'{path} must have {kind}, got {image.dtype}: convert it first.')
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if image.shape[2] == 4:
        if image[:, :, 3].min() < np.iinfo(image.dtype).max:
            raise InputError(f'{path} must be opaque, got transparent pixels: flatten it first.')
        image = np.ascontiguousarray(image[:, :, :3])
    return image


@contextlib.contextmanager
def memory_errors(path: Path) -> Iterator[None]:
    """Turn a lack of memory for an image into InputError."""
    try:
        yield
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise InputError(f'{path} needs more memory than there is.') from None


def name_images(reasons: Collection[str], total: int, what: str) -> str:
    """A sentence about some of ``total`` images: how many they are and why, a line for each where they are several.

    Args:
        reasons: a sentence for each that names it.
        total: number of images.
        what: what is said of them: 'cannot be used', 'left out'.
    """
    before = ' ' if len(reasons) == 1 else '\n  '
    return f'{len(reasons)} of {total} images {what}:' + ''.join(
        f'{before}{printable(reason).rstrip(".")}.' for reason in reasons
    )


def check_left_out(left_out: Collection[str], total: int, skip_broken: bool) -> None:
    """Refuse to go on without the images that cannot be used, unless that is wanted and some are left.

    Args:
        left_out: a sentence for each.
        total: number of images.
        skip_broken: whether it is wanted.

    Raises:
        InputError: naming them.
    """
    if not left_out or (skip_broken and len(left_out) < total):
        return
    hint = ', which --skip-broken leaves out' if len(left_out) < total else ''
    raise InputError(name_images(left_out, total, f'cannot be used{hint}'))


def _plain_sources(
    folder: Path, scales: Sequence[int], lr_folder: Path | None, misfits: dict[str, str]
) -> list[Source]:
    """The images of a folder, or of the published DIV2K or Flickr2K."""
    sources = []
    for hr_folder in _hr_folders(folder):
        lr_of_scale = {}
        for scale in scales:
            lr_of_hr_folder = (
                _given_lr_folder(lr_folder, scale, len(scales)) if lr_folder else _published_lr_folder(hr_folder, scale)
            )
            if lr_of_hr_folder:
                if os.path.samefile(hr_folder, lr_of_hr_folder):
                    raise InputError(
                        'The LR images must be in another folder than the HR images, got '
                        f'{hr_folder} and {lr_of_hr_folder}, which are the same.'
                    )
                lr_of_scale[scale] = _pair(hr_folder, lr_of_hr_folder, scale, misfits)
        for path in _images(hr_folder):
            if str(path) not in misfits:
                sources.append(Source(_key(path.stem), path, {scale: lr[path] for scale, lr in lr_of_scale.items()}))
    return sources


def _captured_parts(folder: Path) -> list[_Part]:
    """The parts of RealSR or DRealSR at and below a folder; none if it is another folder."""
    here = Path(os.path.abspath(folder))  # `.` has no name
    if not here.is_dir():
        return []
    images = _images(here)
    parts = []
    for path in [here] if images else sorted([*here.glob('T*/*'), *here.glob('*/T*/*')]):
        if path.parent.name in ('Train', 'Test') and path.name.isdecimal() and _has_image(path, r'_(HR|LR\d)$'):
            parts.append(_Part('RealSR', path.parent.name.lower(), int(path.name), path, path))
    if not parts and images and _has_image(here, r'_LR\d$'):
        parts.append(_Part('RealSR', None, None, here, here))
    if parts or images:
        return parts
    # Each of the published archives has a folder of its own name, in which it may have been unpacked.
    for pattern in ('', 'T*_x?/', 'T*_x?/T*_x?/', 'x?/T*_x?/', 'x?/T*_x?/T*_x?/'):
        for path in sorted(here.glob(f'{pattern}t*_HR')):
            split, scale = path.name[: -len('_HR')], re.fullmatch(r'T\w+_x(\d)', path.parent.name)
            if split in SPLITS:
                parts.append(_Part('DRealSR', split, scale and int(scale[1]), path, path.with_name(f'{split}_LR')))
    return parts


def _has_image(folder: Path, pattern: str) -> bool:
    return folder.is_dir() and any(re.search(pattern, path.stem) for path in _images(folder))


def _captured_sources(
    folder: Path,
    parts: list[_Part],
    scales: Sequence[int],
    lr_folder: Path | None,
    split: str | None,
    misfits: dict[str, str],
) -> list[Source]:
    """The pairs of the parts that are wanted."""
    dataset = parts[0].dataset
    if lr_folder or not scales:
        raise InputError(
            f'{folder} must be a folder of HR images alone, got {dataset}, which has LR images of its own.'
        )
    if len(scales) > 1:
        raise InputError(
            f'--scale must be one scale at a time for {folder}, got {" ".join(map(str, scales))}: {dataset} has other '
            'HR images at each.'
        )
    scale = scales[0]
    wanted = [part for part in parts if part.scale in (None, scale) and (not split or part.split in (None, split))]
    if not wanted:
        there = sorted({f'{part.split} at scale {part.scale}' if part.scale else str(part.split) for part in parts})
        raise InputError(
            f'{folder} is {dataset} with {", ".join(there)}, where {f"{split} at " if split else ""}scale {scale} is '
            'wanted.'
        )
    if len({part.split for part in wanted}) > 1:
        raise InputError(f'--split must be train or test for {folder}, which has both, got none.')
    sources = []
    for part in wanted:
        if not part.lr.is_dir():
            raise InputError(f'{part.lr} is not a folder, where the LR images of {part.hr} are expected.')
        for hr, lr in _pair(part.hr, part.lr, scale, misfits).items():
            # `NAME_HR` and `NAME_x4` are both NAME; the parts of DRealSR for training may have a number behind.
            key = _key(re.sub(rf'_HR$|_x{scale}(?=_|$)', '', hr.stem))
            sources.append(Source(key, hr, {scale: lr}, captured=True))
    return sources


def _key(name: str) -> str:
    return re.sub('[^A-Za-z0-9_-]', '_', name)


def _hr_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f'{folder} is not a folder: it must be one of HR images.')
    if _images(folder):
        return [folder]
    published = [folder / name for name in PUBLISHED_HR_FOLDERS if (folder / name).is_dir()]
    for hr_folder in published:
        if not _images(hr_folder):
            raise InputError(f'{hr_folder} has no images ({", ".join(IMAGE_SUFFIXES)}).')
    if not published:
        raise InputError(
            f'{folder} has no images, nor is it the root of DIV2K, Flickr2K, RealSR or DRealSR, with a folder '
            f'{", ".join(PUBLISHED_HR_FOLDERS)}, CAMERA/Train/4 or Train_x4; other sub-folders are not searched.'
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


def _published_lr_folder(hr_folder: Path, scale: int) -> Path | None:
    hr_folder = Path(os.path.abspath(hr_folder))  # `.` has no name
    if not hr_folder.name.endswith('_HR'):
        return None
    lr_folder = hr_folder.parent / f'{hr_folder.name[: -len("_HR")]}_LR_bicubic' / f'X{scale}'
    return lr_folder if lr_folder.is_dir() else None


def _pair(hr_folder: Path, lr_folder: Path, scale: int, misfits: dict[str, str]) -> dict[Path, Path]:
    """{HR file: its LR file}, one to one; the others go to ``misfits``.

    Where both are in one folder, ``NAME_HR`` are the HR files.
    """
    hr_paths, lr_paths = _images(hr_folder), _images(lr_folder)
    if os.path.samefile(hr_folder, lr_folder):
        hr_paths = [path for path in hr_paths if path.stem.endswith('_HR')]
        lr_paths = [path for path in lr_paths if not path.stem.endswith('_HR')]
    lr_of_stem = {path.stem: path for path in lr_paths}
    unused = set(lr_of_stem)
    pairs = {}
    first_of_stem: dict[str, Path] = {}
    for path in hr_paths:
        first = first_of_stem.setdefault(path.stem, path)
        if first != path:
            misfits[str(path)] = f'{path} must have a name of its own, got that of {first.name}: rename or remove one.'
            continue
        for stem in _lr_stems(path.stem, scale):
            if stem in unused:
                unused.remove(stem)
                pairs[path] = lr_of_stem[stem]
                break
        else:
            stems = _lr_stems(path.stem, scale)
            names = ' or '.join(f'`{stem}`' for stem in stems[2:] or stems)
            misfits[str(path)] = f'{path} has no LR image in {lr_folder}, where it must be called {names}.'
    for path in lr_paths:
        if path.stem in unused:
            misfits[str(path)] = f'{path} has no HR image in {hr_folder}.'
    return pairs


def _lr_stems(stem: str, scale: int) -> list[str]:
    """What the LR image of an HR image may be called, without extensions."""
    stems = [f'{stem}x{scale}', stem]
    if stem.endswith('_HR'):
        stems.append(f'{stem[: -len("_HR")]}_LR{scale}')  # RealSR
    return list(dict.fromkeys([*stems, re.sub(rf'_x{scale}(?=_|$)', '_x1', stem)]))  # DRealSR


def _images(folder: Path) -> list[Path]:
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.') and path.is_file()
        )
    except OSError as error:
        raise InputError(f'{folder} cannot be read ({error.strerror}).') from error


def left_out(folder: str | os.PathLike[str]) -> list[str]:
    """The names of what a folder of images holds besides, which is not read: other files, and folders with a ``/``."""
    if not _images(Path(folder)):  # the root of a published set, of which the folders are read
        return []
    entries = [path for path in Path(folder).iterdir() if not path.name.startswith('.')]
    others = [path for path in entries if not path.is_file() or path.suffix.lower() not in IMAGE_SUFFIXES]
    return sorted(f'{path.name}/' if path.is_dir() else path.name for path in others)


def _is_damaged(data: bytes) -> bool:
    """Whether a PNG or JPEG file is cut short, or a PNG's checksums are wrong.

    OpenCV fills what is missing with gray or black and says so on stderr only; such an image must not be trained on.
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
