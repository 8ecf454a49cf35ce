"""File modes as the user's umask has them, whichever library wrote the file.

safetensors makes files that only their owner may read, and copies keep their source's modes.
The umask itself belongs to the whole process and cannot be read without being changed.
"""

from __future__ import annotations

import stat
from pathlib import Path

from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, new_token


def follow_umask(folder: Path) -> None:
    """Give everything in a folder the modes that new files and folders get there.

    A file and a folder made for this purpose show the modes: no process-wide umask is touched, so
    other threads may run, and a default access control list counts too.

    Args:
        folder: a folder that no other process writes to; best before it gets its name.

    Raises:
        OSError: when the operating system refuses.
    """
    paths = list(folder.rglob("*"))
    new_folder = folder / f"{TEMPORARY_PREFIX}{new_token()}"
    new_folder.mkdir()
    try:
        new_file = new_folder / "file"
        new_file.touch()
        folder_mode, file_mode = (_mode(path) for path in (new_folder, new_file))
        new_file.unlink()
    finally:
        new_folder.rmdir()
    for path in paths:
        if path.is_symlink():
            continue
        mode = folder_mode if path.is_dir() else file_mode
        # File systems without modes refuse to set one; on these all modes are the same anyway.
        if _mode(path) != mode:
            path.chmod(mode)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
