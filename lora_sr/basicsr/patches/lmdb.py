"""A database may be opened more than once."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

from lora_sr.basicsr.patches.tools import is_defective, patch
from lora_sr.errors import InputError

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


_databases: weakref.WeakValueDictionary[str, Environment] = weakref.WeakValueDictionary()


def _open_database(path: str, settings: dict[str, Any]) -> Environment:
    import lmdb

    # A forked worker goes on with its parent's: read-only and without locks it is a mere memory map, and lmdb would
    # refuse to open it anew there.
    key = os.path.realpath(path)
    environment = _databases.get(key)
    if environment is None:
        environment = _databases[key] = lmdb.open(path, **settings)
    return environment
