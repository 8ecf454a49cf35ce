"""Replacing a whole set: it is renamed aside, and what follows is an ordinary build.

A worker that slept through this still holds the old folder by handle and writes into it. The
folder aside marks an unfinished withdrawal while the new set has no manifest; the finisher
removes it. Rejected: deleting shards in place, which frees names for workers that slept.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from sdxl_distill.builder.launch import Launch, refuse_in_job_array
from sdxl_distill.builder.work_queue import BUILD_FOLDER
from sdxl_distill.catalog.catalog import CATALOG_FOLDER
from sdxl_distill.errors import ConfigError
from sdxl_distill.shards.manifest import MANIFEST_NAME
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, new_token
from sdxl_distill.storage.location import Location

_OWN_FOLDERS: Final = (BUILD_FOLDER, CATALOG_FOLDER)
_REPAIRING = "-repairing"
_REPAIRED = "-repaired"


def withdraw_for_rebuild(launch: Launch, location: Location) -> None:
    """Withdraw a set once for a whole launch (`cache.skip_existing: false`).

    A withdrawal whose new set is not complete yet is continued, not repeated, so that a killed
    or restarted launch keeps what it built.

    Raises:
        ConfigError: in a job array, unless the set was withdrawn before; when it contains
            folders that are not the set's.
        StorageError: when the folder cannot be renamed.
    """

    def decide() -> None:
        if is_withdrawn(location) or launch.is_restart:
            return
        refuse_in_job_array(launch, str(location))
        withdraw_set(location)

    launch.decide(f"withdraw {location}", decide)


def is_withdrawn(location: Location) -> bool:
    """Whether the set was renamed aside to be rebuilt and has no new manifest yet."""
    aside = any(not each.name.endswith((_REPAIRING, _REPAIRED)) for each in folders_aside(location))
    return aside and not (location / MANIFEST_NAME).exists()


def withdraw_set(location: Location, *, for_repair: bool = False) -> Location:
    """Rename a set aside in one step and return where it is now.

    Without a set, an empty folder is put aside: it marks that the set is being built again.

    Raises:
        ConfigError: when it contains folders that are not the set's.
        StorageError: when the folder cannot be renamed.
    """
    location = location.real()
    require_own_folders(location)
    aside = location.renamed(f"{_prefix(location)}{new_token()}{_REPAIRING if for_repair else ''}")
    if location.exists():
        location.rename(aside)
    else:
        aside.make()
    return aside


def require_own_folders(location: Location) -> None:
    """Check that nothing else would be moved away with a set: predictions, images, other work.

    Raises:
        ConfigError: naming a folder in it that no builder of sets makes.
        StorageError: when it cannot be listed.
    """
    foreign = [name for name in location.folders() if name not in _OWN_FOLDERS]
    if foreign:
        raise ConfigError(
            f"the folder {foreign[0]!r} lies in the set's folder and would be moved away with it",
            expected="nothing but the set in its folder",
            where=str(location),
            action="move it elsewhere, and change the configuration if it names it",
        )


def folders_aside(location: Location) -> list[Location]:
    """Return the folders of earlier states of a set, those kept by a repair included."""
    location = location.real()
    return location.siblings(_prefix(location))


def folders_to_repair_from(location: Location) -> list[Location]:
    """Return the folders that an unfinished repair takes good shards from."""
    return [each for each in folders_aside(location) if each.name.endswith(_REPAIRING)]


def kept_after_repair(aside: Location) -> Location:
    """Return the name that a repair's folder has once the repaired set is complete."""
    return aside.renamed(aside.name.removesuffix(_REPAIRING) + _REPAIRED)


def discard_withdrawn(location: Location, set_id: str) -> None:
    """Remove what was withdrawn, once the new set is complete; keep a repair's folder.

    Only files that a builder of set `set_id` writes are removed: others belong to the user.
    """
    for aside in folders_aside(location):
        # All workers of a launch do this at once: what one finds gone, another removed.
        if aside.name.endswith(_REPAIRING):
            aside.rename(kept_after_repair(aside), missing_ok=True)
        elif not aside.name.endswith(_REPAIRED):
            aside.remove_own(_OWN_FOLDERS, partial(_is_own_file, set_id))


def _is_own_file(set_id: str, name: str) -> bool:
    return (
        name in (SET_IDENTITY_NAME, MANIFEST_NAME, EMPTY_RECORD_NAME)
        or name.startswith(TEMPORARY_PREFIX)
        or ShardName.parse(name, set_id) is not None
    )


def _prefix(location: Location) -> str:
    return f".{location.name}.withdrawn-"
