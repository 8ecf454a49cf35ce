"""Pre-flight checks, before anything is scanned, loaded or computed.

They refuse a folder of another configuration, and a checkpoint whose networks are not complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from sdxl_distill.builder.commit import naming_repair
from sdxl_distill.errors import CorruptError
from sdxl_distill.models.component import Component
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.storage.location import Location


def require_same_set(location: Location, identity: SetIdentity, *, repair: bool = False) -> None:
    """Check that a folder is free, or holds the set that is to be built; writes nothing.

    `commit.publish_set_identity` decides; this check saves the work before it.

    Args:
        location: the folder of the set; need not exist.
        identity: the identity of the set that is to be built there.
        repair: accept a damaged `set.json`, since it will be replaced.

    Raises:
        IncompatibleError: naming every field that differs.
        CorruptError: when the existing set identity is damaged.
        StorageError: when it cannot be read.
    """
    folder = SetFolder(location.look())
    where = folder.where(SET_IDENTITY_NAME)
    forgiven = (FileNotFoundError, CorruptError) if repair else (FileNotFoundError,)
    with suppress(*forgiven), naming_repair(where):
        identity.require_same(folder.identity(), where)


def require_complete(
    location: Location, identity: SetIdentity, networks: Iterable[Component]
) -> None:
    """Check that networks have all the weights they need, if a new set is to be built with them.

    An existing set with networks of these fingerprints shows that they were checked before. To
    check them again would cost seconds each time that a builder finds everything done, to import
    the library that knows the weights' names.

    Args:
        location: the folder of the set; need not exist.
        identity: the identity of the set that is to be built there.
        networks: the networks whose fingerprints are in the identity.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `Component.require_complete`.
        StorageError: when the existing set identity cannot be read.
    """
    with suppress(FileNotFoundError, CorruptError):
        if SetFolder(location.look()).identity().fingerprint == identity.fingerprint:
            return
    for network in networks:
        network.require_complete()
