"""A database may be opened more than once, and cut while it is read."""

from __future__ import annotations

import functools
import os
import weakref
from typing import TYPE_CHECKING, Any

from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch
from lora_sr.data.lmdb_store import DATA_FILE, bytes_of_pages, check_whole
from lora_sr.errors import InputError
from lora_sr.files import identity

if TYPE_CHECKING:
    from lmdb import Environment


def patch_lmdb_backend() -> None:
    """``LmdbBackend`` opens a database once for each dataset, which lmdb refuses to do twice in a process.

    Two validation sets with the same GT, or training and validation without workers on the same database, fail so.
    """
    from basicsr.utils.file_client import LmdbBackend

    if not is_defective(LmdbBackend.__init__, 'open'):
        return

    @patch
    def __init__(
        self: Any,
        db_paths: str | list[str],
        client_keys: str | list[str] = 'default',
        readonly: bool = True,
        lock: bool = False,
        readahead: bool = False,
        **kwargs: Any,
    ) -> None:
        paths = db_paths if isinstance(db_paths, list) else [db_paths]
        keys = client_keys if isinstance(client_keys, list) else [client_keys]
        if len(paths) != len(keys):
            raise InputError(
                f'client_keys of io_backend must be as many as its db_paths, {len(paths)}, got {len(keys)}.'
            )
        self.db_paths = [str(path) for path in paths]
        settings = dict(readonly=readonly, lock=lock, readahead=readahead, **kwargs)
        self._client = {key: _open_database(path, settings) for key, path in zip(keys, self.db_paths)}

    LmdbBackend.__init__ = __init__


def patch_reading_of_databases() -> None:
    """``LmdbBackend.get`` reads pages that a file has no longer, of which the process dies without a word.

    Somebody may cut or copy over a database under a run; and the map of a file is read beyond its end without an error.
    """
    from basicsr.utils.file_client import LmdbBackend

    original = LmdbBackend.get
    if is_patch(original):
        return

    @patch
    @functools.wraps(original)
    def get(self: Any, filepath: object, client_key: str) -> bytes | None:
        environment = self._client.get(client_key)
        if environment in _opened:
            file, needed = _opened[environment]
            # Another file of that name is not the one that is read, which may be whole though it has no name.
            if file == identity(os.path.join(environment.path(), DATA_FILE)):
                check_whole(environment.path(), needed)
        return original(self, filepath, client_key)

    LmdbBackend.get = get


_databases: weakref.WeakValueDictionary[str, Environment] = weakref.WeakValueDictionary()
# Which file it is, and how many bytes it needs.
_opened: weakref.WeakKeyDictionary[Environment, tuple[tuple[int, int] | None, int]] = weakref.WeakKeyDictionary()


def _open_database(path: str, settings: dict[str, Any]) -> Environment:
    import lmdb

    # A forked worker goes on with its parent's: read-only and without locks it is a mere memory map, and lmdb would
    # refuse to open it anew there.
    key = os.path.realpath(path)
    environment = _databases.get(key)
    if environment is None:
        try:
            environment = _databases[key] = lmdb.open(path, **settings)
            _opened[environment] = identity(os.path.join(path, DATA_FILE)), bytes_of_pages(environment)
        except lmdb.Error as error:
            raise InputError(f'the database {path} cannot be opened: {error}') from error
    return environment
