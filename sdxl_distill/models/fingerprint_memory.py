"""Fingerprints of files that have not changed, remembered in the user's cache folder.

Hashing the networks of one SDXL checkpoint reads 7 GB, and every command asks for it. A file
counts as unchanged while its path, size, inode and both times are the same: the time of the inode's
last change cannot be set by tools that copy the other. `--rehash` distrusts all that.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from sdxl_distill.errors import DistillError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import storage_errors

_VERSION: Final = 1
_FOLDER: Final = "fingerprints"
_MAX_BYTES: Final = 1024
_MAX_ENTRIES: Final = 1000
_SETTLED_SECONDS: Final = 2.0
"""Files changed later than so long ago may change again without another time: not remembered."""

_log = logging.getLogger(__name__)
_distrusted = False


def distrust() -> None:
    """Compute every fingerprint of this process again, and remember the new ones."""
    global _distrusted
    _distrusted = True


def remembered(files: Iterable[Path], described: Any, compute: Callable[[], str]) -> str:
    """Return the fingerprint that was computed of the same files before, or compute it.

    A memory that cannot be read or written costs the time that it would have saved, and no more.

    Args:
        files: the files that the fingerprint depends on.
        described: what else it depends on, as JSON values.
        compute: the function that reads the files.

    Raises:
        StorageError: when a file cannot be looked at; also whatever `compute` raises.
    """
    paths = sorted(set(files))
    states = [_state(path) for path in paths]
    name = f"{fingerprint({'version': _VERSION, 'files': states, 'described': described})}.json"
    folder = memory_folder()
    if not _distrusted and (found := _read(folder / name)) is not None:
        _log.debug("the fingerprint of %s is remembered in %s", paths[0].parent, folder)
        return found
    started = time.time()
    found = compute()
    newest = max(max(state[2:4]) for state in states) / 1e9
    if newest < started - _SETTLED_SECONDS and [_state(path) for path in paths] == states:
        _write(folder, name, found)
    return found


def memory_folder() -> Path:
    """Return the folder of remembered fingerprints: below XDG_CACHE_HOME, or else ~/.cache.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "sdxl_distill" / _FOLDER


def _state(path: Path) -> Sequence[Any]:
    with storage_errors(path):
        state = path.stat()
    return [
        os.fspath(path.resolve()),
        state.st_size,
        state.st_mtime_ns,
        state.st_ctime_ns,
        state.st_ino,
        state.st_dev,
    ]


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MAX_BYTES))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_digest = (
        isinstance(found, str) and len(found) == 64 and set(found) <= set("0123456789abcdef")
    )
    return found if is_digest else None


def _write(folder: Path, name: str, found: str) -> None:
    with suppress(DistillError, OSError), Directory(folder, create=True) as directory:
        directory.replace_bytes(name, json.dumps({"fingerprint": found}).encode())
        names = [each for each in directory.names() if each.endswith(".json")]
        if len(names) > _MAX_ENTRIES:
            by_age = sorted(names, key=lambda each: (folder / each).stat().st_mtime_ns)
            for each in by_age[: len(names) - _MAX_ENTRIES]:
                directory.remove(each)
