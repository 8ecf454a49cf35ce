"""Replacing a whole set: it is renamed aside, and what follows is an ordinary build.

A worker that slept through this still holds the old folder by handle and writes there. The
folder aside marks an unfinished withdrawal while the new set has no manifest; the finisher
removes it. Rejected: deleting shards in place, which frees names for workers that slept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sdxl_distill.builder.launch import Launch, refuse_in_job_array
from sdxl_distill.builder.work_queue import BUILD_FOLDER
from sdxl_distill.catalog.catalog import CATALOG_FOLDER
from sdxl_distill.errors import ConfigError
from sdxl_distill.shards.manifest import MANIFEST_NAME
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import EMPTY_RECORD_NAME
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, Directory, new_token, sync_folder
from sdxl_distill.storage.path_text import real_path
from sdxl_distill.storage.regular_file import storage_errors

_REPAIRING = "-repairing"
_REPAIRED = "-repaired"


def withdraw_for_rebuild(launch: Launch, path: Path) -> None:
    """Withdraw a set once for a whole launch (`cache.skip_existing: false`).

    A withdrawal whose new set is not complete yet is continued, not repeated, so that a killed
    or restarted launch keeps what it built.

    Raises:
        ConfigError: in a job array, unless the set was withdrawn before; when folders lie in it
            that are not the set's.
        StorageError: when the folder cannot be renamed.
    """

    def decide() -> None:
        if is_withdrawn(path) or launch.is_restart:
            return
        refuse_in_job_array(launch, str(path))
        withdraw_set(path)

    launch.decide(f"withdraw {path}", decide)


def is_withdrawn(path: Path) -> bool:
    """Whether the set was renamed aside to be rebuilt and its new manifest is not there yet."""
    aside = any(not place.name.endswith((_REPAIRING, _REPAIRED)) for place in folders_aside(path))
    return aside and not (path / MANIFEST_NAME).exists()


def withdraw_set(path: Path, *, for_repair: bool = False) -> Path:
    """Rename a set aside in one step and return where it is now.

    Where there is no set, an empty folder aside marks that the set is being built anew.

    Raises:
        ConfigError: when folders lie in it that are not the set's.
        StorageError: when the folder cannot be renamed.
    """
    path = real_path(path)
    require_own_folders(path)
    aside = path.parent / f"{_prefix(path)}{new_token()}{_REPAIRING if for_repair else ''}"
    with Directory(path.parent, create=True) as parent, storage_errors(path):
        if path.exists():
            path.rename(aside)
        else:
            aside.mkdir()
        sync_folder(parent.descriptor)
    return aside


def require_own_folders(path: Path) -> None:
    """Check that nothing else would go aside with a set: predictions, images, other work.

    Raises:
        ConfigError: naming a folder in it that no builder of sets makes there.
    """
    with storage_errors(path):
        own = (BUILD_FOLDER, CATALOG_FOLDER)
        foreign: list[str] = []
        if path.is_dir():
            with os.scandir(path) as entries:  # which asks for no status of each of many shards
                foreign = sorted(each.name for each in entries if each.is_dir())
        foreign = [name for name in foreign if name not in own]
    if foreign:
        raise ConfigError(
            f"the folder {foreign[0]!r} lies in the set's folder and would go aside with it",
            expected="nothing but the set in its folder",
            where=str(path),
            action="move it elsewhere, and change the configuration if it names it",
        )


def folders_aside(path: Path) -> list[Path]:
    """Return the folders of earlier states of a set, those kept by a repair included."""
    path = real_path(path)
    if not path.parent.is_dir():
        return []
    prefix = _prefix(path)
    return sorted(place for place in path.parent.iterdir() if place.name.startswith(prefix))


def folders_to_repair_from(path: Path) -> list[Path]:
    """Return the folders that an unfinished repair takes good shards from."""
    return [place for place in folders_aside(path) if place.name.endswith(_REPAIRING)]


def kept_after_repair(aside: Path) -> Path:
    """Return the name that a repair's folder has once the repaired set is complete."""
    return aside.with_name(aside.name.removesuffix(_REPAIRING) + _REPAIRED)


def discard_withdrawn(path: Path, set_id: str) -> None:
    """Remove what was withdrawn, once the new set is complete; a repair's folder stays.

    Only files that a builder of set `set_id` writes are removed: others are somebody's.
    """
    for aside in folders_aside(path):
        # All workers of a launch do this at once: what one finds gone, another removed.
        with storage_errors(aside), suppress(FileNotFoundError):
            if aside.name.endswith(_REPAIRING):
                aside.rename(kept_after_repair(aside))
            elif not aside.name.endswith(_REPAIRED):
                _discard(aside, set_id)


def _discard(aside: Path, set_id: str) -> None:
    for folder in (BUILD_FOLDER, CATALOG_FOLDER):
        shutil.rmtree(aside / folder, ignore_errors=True)
    for place in _own_files(aside, set_id):
        place.unlink(missing_ok=True)
    with suppress(OSError):  # not empty: foreign files, or a zombie that still writes
        aside.rmdir()


def _own_files(aside: Path, set_id: str) -> Iterator[Path]:
    for place in aside.iterdir():
        name = place.name
        known = name in (SET_IDENTITY_NAME, MANIFEST_NAME, EMPTY_RECORD_NAME)
        temporary = name.startswith(TEMPORARY_PREFIX)
        if known or temporary or ShardName.parse(name, set_id):
            yield place


def _prefix(path: Path) -> str:
    return f".{path.name}.withdrawn-"
