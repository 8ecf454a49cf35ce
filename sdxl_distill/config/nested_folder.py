"""Folders that may not lie in a set's folder: replacing or repairing it would remove them too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdxl_distill.config.section import BrokenRule
from sdxl_distill.storage.path_text import real_path

Key = tuple[str | int, ...]


def require_beside_sets(sets: Mapping[str, str | Path], folders: Mapping[Key, str | Path]) -> None:
    """Check that no folder is that of a set, or in it.

    Args:
        sets: each set's name in errors, and its folder.
        folders: keys of the configuration, and the folders that they name.

    Raises:
        BrokenRule: for the first folder that is.
    """
    for name, set_folder in sets.items():
        for key, folder in folders.items():
            if _real(folder).is_relative_to(_real(set_folder)):
                raise BrokenRule(
                    f'"{folder}" lies in the folder of {name}, "{set_folder}"',
                    expected="a folder outside: replacing or repairing the set would remove it too",
                    key=key,
                    action="choose another folder; move what is there already",
                )


def _real(folder: str | Path) -> Path:
    try:
        return real_path(folder)
    except ValueError:  # not a path at all: reported where it is used
        return Path(folder)
