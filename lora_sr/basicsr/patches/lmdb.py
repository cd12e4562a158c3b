"""A database may be opened more than once, and cut while it is read."""

from __future__ import annotations

import functools
from typing import Any

from lora_sr.basicsr.patches.tools import is_defective, is_patch, patch
from lora_sr.data.lmdb_store import check_still_whole, open_database
from lora_sr.errors import InputError


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
        self._client = {key: open_database(path, **settings) for key, path in zip(keys, self.db_paths)}

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
        if environment is not None:
            check_still_whole(environment)
        return original(self, filepath, client_key)

    LmdbBackend.get = get
