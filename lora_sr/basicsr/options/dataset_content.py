"""Checks of datasets, LMDB or folders, before a run starts: one sentence for each thing that is wrong."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import lmdb
from PIL import Image

from lora_sr.basicsr.datasets import paired_roots, roots_of
from lora_sr.basicsr.options import schema
from lora_sr.basicsr.raw_datasets import Roots
from lora_sr.data.lmdb_store import (
    PNG_END,
    PNG_SIGNATURE,
    RawImage,
    band_key,
    bytes_of_pages,
    check_whole,
    is_raw,
    open_list,
    read_meta_info,
    read_raw_meta_info,
)
from lora_sr.errors import InputError, shown

# Reading a header costs little, reading all of a file a lot more: larger datasets are sampled evenly.
MAX_HEADERS = 20000
MAX_WHOLE_FILES = 400
# Benchmark images are often larger than scale x LR by what a crop to a multiple of 12 would take away.
VALIDATION_SLACK = 12
LONGEST_PATH = 4096
ORIENTATION = 0x0112  # of EXIF


def check_pairs(where: str, dataset: dict, scale: int, training: bool) -> tuple[list[str], Pairs | None]:
    """Check a `PairedImageDataset`: that its files exist, can be read, pair, and have sizes that fit.

    Args:
        where: what the section is called, e.g. 'datasets.train'.
        dataset: the section.
        scale: by how much GT is larger than LR.
        training: whether the pairs are cropped to `gt_size`; sizes have to fit exactly then.

    Returns:
        The sentences, and the pairs, which are None where something is wrong.
    """
    try:
        roots = paired_roots(dataset)
    except InputError as error:
        return [f'{where}.{error}'], None
    problems: list[str] = []
    of_roots: dict[tuple, Pairs] = {}
    for gt, lq, names in dict.fromkeys(roots):
        section = {**dataset, 'dataroot_gt': gt, 'dataroot_lq': lq, 'meta_info_file': names}
        found, pairs = _check_pair_of_roots(where, section, scale, training, len(set(roots)) > 1)
        problems += found
        if pairs is not None:
            of_roots[gt, lq, names] = pairs
    if problems:
        return list(dict.fromkeys(problems)), None  # of a root that is in several pairs there is one
    if dataset.get('type') == schema.RAW_PAIRED:
        for key, place in (('dataroot_gt', 0), ('dataroot_lq', 1)):
            problems += _unequal_channels(f'{where}.{key}', [pair[place] for pair in roots])
        if problems:
            return problems, None
    together = Pairs(entry for pair in roots for entry in of_roots[pair])
    together.total = sum(of_roots[pair].total for pair in roots)
    together.namesakes = _namesakes([(pair[1], of_roots[pair]) for pair in roots])
    return [], together


def _check_pair_of_roots(
    where: str, dataset: dict, scale: int, training: bool, several: bool
) -> tuple[list[str], Pairs | None]:
    """What :func:`check_pairs` says of one root of each; of ``several``, sentences name the root of an image, too."""
    roots = {}
    problems = []
    kind = dataset['io_backend']['type']
    for key in ('dataroot_gt', 'dataroot_lq'):
        path = Path(os.path.expanduser(str(dataset[key])))
        roots[key] = path
        problems += _root_problems(f'{where}.{key}', path, kind)
    if problems:
        return problems, None
    gt, lq = roots.values()
    try:
        if kind == 'lmdb':
            pairs = _database_pairs(where, dataset, gt, lq)
            _check_list_of_database(where, dataset, [name for name, *_ in pairs], str(gt) if several else 'a database')
        else:
            pairs = _folder_pairs(where, dataset, gt, lq, several)
        if several:
            pairs[:] = [(os.path.join(gt, name), *sizes) for name, *sizes in pairs]
        _check_sizes(where, dataset, pairs, scale, training)
    except InputError as error:
        return [str(error)], None
    return [], pairs


def check_lr_images(where: str, dataset: dict) -> tuple[list[str], int | None]:
    """Check an `LRImageDataset`: that its images exist, can be read, and are large enough for a patch.

    Args:
        where: what the section is called, e.g. 'datasets.train'.
        dataset: the section.

    Returns:
        The sentences, and the number of images, which is None where something is wrong.
    """
    key, kind, size = f'{where}.dataroot_lq', dataset['io_backend']['type'], dataset['lq_size']
    roots = [Path(os.path.expanduser(str(root))) for root in roots_of(dataset['dataroot_lq'])]
    problems = [problem for root in dict.fromkeys(roots) for problem in _root_problems(key, root, kind)]
    if problems:
        return problems, None
    counts = {}
    try:
        for root in roots:
            if root not in counts:
                shapes, counts[root] = _database_sizes(root, dataset) if kind == 'lmdb' else _folder_shapes(root)
                if not shapes:
                    raise InputError(f'{root} holds no images')
                name, smallest = min(shapes.items(), key=lambda entry: min(entry[1]))
                if min(smallest) < size:
                    return [f"{where}.lq_size: {size} is larger than '{name}' of {_size(smallest)} in {root}"], None
    except InputError as error:
        return [f'{key}: {error}'], None
    if dataset.get('type') == schema.RAW_LR:
        problems = _unequal_channels(key, roots_of(dataset['dataroot_lq']))
    return problems, None if problems else sum(counts[root] for root in roots)


def _unequal_channels(key: str, roots: list) -> list[str]:
    """What is wrong with raw images that go into the same batches."""
    try:
        Roots(roots)
    except InputError as error:
        return [f'{key}: {error}']
    return []


def _root_problems(key: str, path: Path, kind: str) -> list:
    if not path.is_dir():
        what = 'is not a folder' if path.exists() else 'does not exist'
        return [f'{key}: {path} {what}']
    if kind == 'lmdb' and path.suffix != '.lmdb':
        return [f'{key}: the name of {path} has to end in .lmdb, since io_backend is lmdb']
    if kind == 'disk' and path.suffix == '.lmdb':
        return [f'{key}: {path} is a database; set io_backend: {{type: lmdb}}']
    return []


def _database_sizes(root: Path, dataset: dict) -> tuple:
    shapes = _database_shapes(root, dataset)
    return {name: shape[:2] for name, shape in shapes.items()}, len(shapes)


def _database_shapes(root: Path, dataset: dict) -> dict:
    """{key: (height, width, channels)} of a database, all of which has been checked.

    Raises:
        InputError: It is damaged, or of the form that this dataset does not read.
    """
    kind = dataset.get('type')
    found = is_raw(root)
    if found and kind not in (schema.RAW_PAIRED, schema.RAW_LR, schema.DEGRADED):
        reader = schema.RAW_LR if kind == schema.LR_ONLY else schema.RAW_PAIRED
        raise InputError(
            f'{root} holds raw images, which {schema.with_article(str(kind))} does not read; set type: {reader}'
        )
    if not found and kind in (schema.RAW_PAIRED, schema.RAW_LR) and (root / 'meta_info.txt').is_file():
        raise InputError(
            f'{root} holds no raw images: make them by lora-sr prepare --raw, or set type: {kind.replace("Raw", "")}'
        )
    images = read_raw_meta_info(root) if found else {}
    shapes = {key: image.shape for key, image in images.items()} if found else read_meta_info(root)
    _check_database(root, shapes, images)
    return shapes


def _folder_shapes(folder: Path) -> tuple:
    names = _file_names(folder)
    whole = set(_sample(names, MAX_WHOLE_FILES))
    return {name: _read_header(folder / name, name in whole)[0] for name in _sample(names, MAX_HEADERS)}, len(names)


class Pairs(list):
    """(name, (height, width) of GT, of LR) of the pairs that were looked at, and how many there are in all.

    Attributes:
        total: How many pairs there are.
        namesakes: A name that the images of two roots have in common, and these roots; None if there is none.
    """

    total = 0
    namesakes: tuple[str, str, str] | None = None


def _namesakes(pairs_of_roots: list[tuple[str, Pairs]]) -> tuple[str, str, str] | None:
    """A name by which images of two roots would be saved, and these roots."""
    roots: dict[str, str] = {}
    for root, pairs in pairs_of_roots:
        names = {os.path.splitext(os.path.basename(name))[0] for name, *_ in pairs}
        both = names & roots.keys()
        if both:
            return min(both), roots[min(both)], root
        roots.update(dict.fromkeys(names, root))
    return None


def _database_pairs(where: str, dataset: dict, gt: Path, lq: Path) -> Pairs:
    shapes = {}
    for key, root in (('dataroot_gt', gt), ('dataroot_lq', lq)):
        try:
            shapes[key] = _database_shapes(root, dataset)
        except InputError as error:
            raise InputError(f'{where}.{key}: {error}') from error
    _check_names(where, set(shapes['dataroot_gt']), set(shapes['dataroot_lq']), gt, lq)
    pairs = Pairs((key, shape[:2], shapes['dataroot_lq'][key][:2]) for key, shape in shapes['dataroot_gt'].items())
    pairs.total = len(pairs)
    return pairs


def _check_list_of_database(where: str, dataset: dict, names: list[str], database: str) -> None:
    """BasicSR reads all of a database, whatever list it is given."""
    file = dataset.get('meta_info_file')
    listed = {os.path.splitext(name)[0] for name in _listed(where, file)} if file is not None else set(names)
    if listed != set(names):
        raise InputError(
            f'{where}.meta_info_file names {len(listed)} images, but BasicSR reads all {len(names)} of {database}; '
            f'leave it out, or prepare a database of those images'
        )


def _listed(where: str, file: str) -> list[str]:
    names = []
    try:
        with open_list(os.path.expanduser(file), 'utf-8') as lines:
            for number, line in enumerate(lines, 1):
                name = line.strip().split(' ')[0]
                if not 0 < len(name) <= LONGEST_PATH:
                    raise InputError(f'{file} must name an image in each line, got "{shown(name)}" in line {number}')
                names.append(name)
    except InputError as error:
        raise InputError(f'{where}.meta_info_file: {error}') from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{where}.meta_info_file: {file} cannot be read: {error}') from error
    if not names:
        raise InputError(f'{where}.meta_info_file: {file} must name an image in each line, got an empty file')
    return names


def _check_database(path: Path, shapes: dict, raw: dict[str, RawImage]) -> None:
    """Check that a database has what its list says, whose ``raw`` images are not PNGs."""
    file = path / 'data.mdb'
    if not file.is_file():
        raise InputError(f'the database {path} has no data.mdb')
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=1)
    except lmdb.Error as error:
        raise InputError(f'the database {path} is damaged: {error}') from error
    with environment:
        check_whole(os.fspath(path), bytes_of_pages(environment))
        try:
            with environment.begin(buffers=True) as transaction:
                entries = transaction.stat()['entries']
                listed = sum(image.bands for image in raw.values()) or len(shapes)
                if entries != listed:
                    raise InputError(f'the database {path} has {entries} entries, but meta_info.txt {listed}')
                for key in _sample(list(raw), MAX_WHOLE_FILES):
                    last = raw[key].bands - 1
                    value = transaction.get(band_key(key, last))
                    if value is None or len(value) != raw[key].band_bytes(last):
                        raise InputError(f"the database {path} is damaged: the entry '{key}' is not a whole image")
                for key in _sample([] if raw else list(shapes), MAX_HEADERS):
                    value = transaction.get(key.encode())
                    if value is None:
                        raise InputError(f"the database {path} has no entry '{key}', which meta_info.txt names")
                    _check_value(path, key, value, shapes[key])
        except lmdb.Error as error:
            raise InputError(f'the database {path} is damaged: {error}') from error


def _check_value(path: Path, key: str, value: memoryview, shape: tuple) -> None:
    head = bytes(value[:24])
    try:
        if head.startswith(PNG_SIGNATURE):  # the size stands here; Pillow would want a copy of the whole value
            if bytes(value[-len(PNG_END) :]) != PNG_END:
                raise ValueError('no end')
            size = int.from_bytes(head[20:24], 'big'), int.from_bytes(head[16:20], 'big')
        else:
            with Image.open(io.BytesIO(value)) as image:
                size = image.size[::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the database {path} is damaged: the entry '{key}' is not a whole image") from error
    if size != tuple(shape[:2]):
        raise InputError(f"the database {path}: '{key}' is {_size(size)}, but {_size(shape)} in meta_info.txt")


def _folder_pairs(where: str, dataset: dict, gt: Path, lq: Path, several: bool) -> Pairs:
    template = dataset.get('filename_tmpl', '{}')
    list_file = dataset.get('meta_info_file')
    if list_file is None:
        gt_names = _file_names(gt)
        gt_to_lq = {name: _paired_name(name, template) for name in gt_names}
        _check_names(where, set(gt_to_lq.values()), set(_file_names(lq)), gt, lq)
    else:
        gt_names = _listed(where, list_file)
        gt_to_lq = {name: _paired_name(os.path.basename(name), template) for name in gt_names}
    pairs = Pairs()
    pairs.total = len(gt_names)
    whole = set(_sample(gt_names, MAX_WHOLE_FILES))
    for name in _sample(gt_names, MAX_HEADERS):
        sizes, turns = [], []
        for key, file in (('dataroot_gt', gt / name), ('dataroot_lq', lq / gt_to_lq[name])):
            try:
                size, turn = _read_header(file, name in whole)
            except InputError as error:
                raise InputError(f'{where}.{key}: {error}') from error
            sizes.append(size)
            turns.append(turn)
        if turns[0] != turns[1]:
            raise InputError(
                f"{where}: GT and LR do not pair: the EXIF data of '{gt / name if several else name}' turn it one way "
                f'in GT and another in LR; write the images anew, upright'
            )
        pairs.append((name, *sizes))
    return pairs


def _paired_name(gt_name: str, template: str) -> str:
    stem, extension = os.path.splitext(gt_name)
    return template.format(stem) + extension


def _file_names(folder: Path) -> list:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith('.'))


def _read_header(file: Path, whole: bool) -> tuple[tuple[int, int], int]:
    """(height, width) as OpenCV decodes it, upright, and how the EXIF data turn it (1: not at all).

    Args:
        file: The image.
        whole: Whether to check the rest of the file as well, as far as its format allows.

    Raises:
        InputError: It is no image, or a damaged one.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            turn = _turn(image)
            if whole and image.format == 'JPEG':  # which has no checksums
                image.draft('L', (1, 1))
                image.load()
            elif whole:
                image.verify()
    except FileNotFoundError as error:
        raise InputError(f'{file} does not exist') from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f'{file} is larger than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels of an image'
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f'{file} is not an image, or a damaged one') from error
    return ((width, height) if turn in (5, 6, 7, 8) else (height, width)), turn


def _turn(image: Image.Image) -> int:
    """How the EXIF data of an image turn it, from 1, not at all, to 8; 1 where they are damaged."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # whatever Pillow makes of what is damaged: it is not the image
        exif.load(image.info.get('exif', b''))
    turn = exif.get(ORIENTATION, 1)
    return turn if turn in range(1, 9) else 1


def _check_names(where: str, gt: set, lq: set, gt_root: Path, lq_root: Path) -> None:
    if not gt and not lq:
        raise InputError(f'{where}.dataroot_gt: {gt_root} holds no images')
    parts = [
        f"'{min(names)}' {f'and {len(names) - 1} more are' if len(names) > 1 else 'is'} missing in {key} ({root})"
        for key, root, names in (('dataroot_lq', lq_root, gt - lq), ('dataroot_gt', gt_root, lq - gt))
        if names
    ]
    if parts:
        raise InputError(f'{where}: GT and LR do not pair: {", ".join(parts)}')


def _check_sizes(where: str, dataset: dict, pairs: Pairs, scale: int, training: bool) -> None:
    for name, gt, lq in pairs:
        excess = [large - scale * small for large, small in zip(gt, lq)]
        if any(value != 0 if training else not 0 <= value < VALIDATION_SLACK for value in excess):
            raise InputError(
                f"{where}: GT and LR do not pair: '{name}' is {_size(gt)} in GT and {_size(lq)} in LR, "
                f'which is not {scale} times as large (scale: {scale})'
            )
    if training:
        name, smallest, _ = min(pairs, key=lambda pair: min(pair[1]))
        if min(smallest) < dataset['gt_size']:
            raise InputError(
                f"{where}.gt_size: {dataset['gt_size']} is larger than the GT image '{name}' of {_size(smallest)}"
            )


def _size(shape: Sequence[int]) -> str:
    """Height and width as width x height."""
    return f'{shape[1]}x{shape[0]}'


def _sample(items: list, count: int) -> list:
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]
