"""What a file in torch's format asks for, looked at before torch reads it."""

from __future__ import annotations

import os
import pickletools
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO
from zipfile import ZIP_STORED, ZipFile

from lora_sr.errors import InputError, shown

MAGIC = b'PK\x03\x04'
END, LOCATOR, END_64 = struct.Struct('<4s12xL2x'), struct.Struct('<4s4xQ4x'), struct.Struct('<48xQ')
LENGTHS = struct.Struct('<26x2H')  # of the name of a member and of what stands behind it
PART_BYTES = 1 << 24
OLD_PICKLES = 5  # of a file from before torch 1.6: two numbers, the machine, the content, the names of its storages
# A training state holds two or three for each parameter of each of its networks; torch takes some 5,000 a second.
MOST_VALUES = 60_000
# What torch lets a pickle call although it takes memory for what is not in the file.
ALLOCATING = ('bytearray', '_rebuild_device_tensor_from_cpu_tensor', '_rebuild_device_tensor_from_numpy')


def check_archive(file: BinaryIO, path: object) -> None:
    """Check that a file in torch's format takes about as much memory as it has bytes when torch reads it.

    Args:
        file: The file, at its beginning.
        path: Its name, for messages.

    Raises:
        InputError: A checksum is wrong; its members are compressed, larger than the file, or more than
            :data:`MOST_VALUES`; or it makes values that are not in it.
        Exception: It is damaged, or no file of that format.
    """
    is_archive = file.read(len(MAGIC)) == MAGIC
    file.seek(0)
    called = next(_called_in_archive(file, path) if is_archive else _called_in_old_format(file, path), None)
    if called is not None:
        raise InputError(f'the checkpoint {path} must hold tensors and plain values alone, got a {called}')


def _called_in_archive(file: BinaryIO, path: object) -> Iterator[str]:
    """Those of :data:`ALLOCATING` that an archive names."""
    members = ZipFile(file)
    if members.start_dir != _directory(file):
        raise ValueError('Python and torch find different members')
    _check_count(len(members.infolist()), path)
    if any(member.filename.endswith('/constants.pkl') for member in members.infolist()):
        raise InputError(f'the checkpoint {path} must be what torch.save writes, got a TorchScript archive')
    if any(member.compress_type != ZIP_STORED for member in members.infolist()):
        raise InputError(f'the checkpoint {path} must be stored as torch.save does it, got compressed members')
    size, claimed = file.seek(0, os.SEEK_END), sum(member.file_size for member in members.infolist())
    if claimed > size:
        raise InputError(
            f'the checkpoint {path} is damaged: its members must have at most its {size:,} bytes, got {claimed:,}'
        )
    is_right = {}
    for member in members.infolist():
        file.seek(member.header_offset)
        file.seek(sum(LENGTHS.unpack(file.read(LENGTHS.size))), os.SEEK_CUR)
        checksum, left, is_pickle = 0, member.file_size, member.orig_filename.lower().endswith('.pkl')
        while left:
            part = file.read(left if is_pickle else min(left, PART_BYTES))
            if not part:
                raise ValueError('the end is missing')
            left -= len(part)
            checksum = zlib.crc32(part, checksum)
            if is_pickle:  # to torch's reader the case is the same
                # To parse it would take as long as to load it, and a name stands there in plain letters.
                yield from (name for name in ALLOCATING if f'\n{name}\n'.encode() in part)
        if member.CRC:  # torch saves without sums where it is told to
            is_right[member.filename] = checksum == member.CRC
    # torch itself reads what does not have its sum.
    wrong = [name for name, right in is_right.items() if not right]
    if wrong and any(is_right.values()):
        raise InputError(
            f'the checkpoint {path} is damaged: {shown(wrong[0])} must have the checksum that it was saved with'
        )


def _directory(file: BinaryIO) -> int:
    """Where torch's reader finds the list of the members: where the end says. To Python it is what is before the end.

    Raises:
        ValueError: There is something behind the end, which torch.save never writes.
    """
    end = file.seek(-END.size, os.SEEK_END)
    signature, directory = END.unpack(file.read(END.size))
    if signature != b'PK\x05\x06':
        raise ValueError('the end is missing')
    if end > LOCATOR.size:
        file.seek(end - LOCATOR.size)
        signature, end_64 = LOCATOR.unpack(file.read(LOCATOR.size))
        if signature == b'PK\x06\x07':
            file.seek(end_64)
            (directory,) = END_64.unpack(file.read(END_64.size))
    return int(directory)


def _called_in_old_format(file: BinaryIO, path: object) -> Iterator[str]:
    """The same of a file from before torch 1.6: a few pickles, and behind them the values as they are."""
    values = 0
    for _ in range(OLD_PICKLES):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == 'GLOBAL':
                yield from (name for name in ALLOCATING if str(argument).endswith(f' {name}'))
            elif opcode.name == 'BINPERSID':
                values += 1
                _check_count(values, path)


def _check_count(values: int, path: object) -> None:
    if values > MOST_VALUES:
        raise InputError(f'the checkpoint {path} must hold at most {MOST_VALUES:,} tensors, got more')
