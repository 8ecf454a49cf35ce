"""Refuses what no set may be begun with, before anything is scanned, loaded or computed.

A folder of another configuration, or a checkpoint whose networks are not complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sdxl_distill.builder.commit import naming_repair
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_SET_IDENTITY_BYTES
from sdxl_distill.models.component import Component
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetIdentity
from sdxl_distill.storage.regular_file import read_bytes


def require_same_set(path: Path, identity: SetIdentity, *, repair: bool = False) -> None:
    """Check that a folder is free, or holds the set that is to be built; writes nothing.

    `commit.publish_set_identity` decides; this saves the work until then.

    Args:
        path: folder of the set; need not exist.
        identity: what is to be built there.
        repair: a damaged `set.json` is no fault, since it will be replaced.

    Raises:
        IncompatibleError: naming every field that differs.
        CorruptError: when the set record there is damaged.
        StorageError: when it cannot be read.
    """
    where = str(path / SET_IDENTITY_NAME)
    forgiven = (FileNotFoundError, CorruptError) if repair else (FileNotFoundError,)
    with suppress(*forgiven), naming_repair(where):
        identity.require_same(_existing_identity(path), where)


def require_complete(path: Path, identity: SetIdentity, networks: Iterable[Component]) -> None:
    """Check that networks have all the weights that they need, if a set is to be begun with them.

    A set that was begun with networks of this fingerprint shows that they were checked before.
    To check them again would cost the seconds in which the library that knows their names is
    imported, each time that a builder finds everything done.

    Args:
        path: folder of the set; need not exist.
        identity: what is to be built there.
        networks: whose fingerprints are in the record.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `Component.require_complete`.
        StorageError: when the set record there cannot be read.
    """
    with suppress(FileNotFoundError, CorruptError):
        if _existing_identity(path).fingerprint == identity.fingerprint:
            return
    for network in networks:
        network.require_complete()


def _existing_identity(path: Path) -> SetIdentity:
    where = path / SET_IDENTITY_NAME
    return SetIdentity.from_bytes(read_bytes(where, MAX_SET_IDENTITY_BYTES), str(where))
