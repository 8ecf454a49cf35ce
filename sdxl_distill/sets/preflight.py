"""Refuses what no set may be begun with, before anything is scanned, loaded or computed.

A folder of another configuration, or a checkpoint whose networks are not complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sdxl_distill.builder.commit import naming_repair
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_SET_RECORD_BYTES
from sdxl_distill.models.component import Component
from sdxl_distill.shards.set_record import SET_RECORD_NAME, SetRecord
from sdxl_distill.storage.regular_file import read_bytes


def require_same_set(path: Path, record: SetRecord, *, repair: bool = False) -> None:
    """Check that a folder is free, or holds the set that is to be built; writes nothing.

    `commit.publish_set_record` decides; this saves the work until then.

    Args:
        path: folder of the set; need not exist.
        record: what is to be built there.
        repair: a damaged `set.json` is no fault, since it will be replaced.

    Raises:
        IncompatibleError: naming every field that differs.
        CorruptError: when the set record there is damaged.
        StorageError: when it cannot be read.
    """
    where = str(path / SET_RECORD_NAME)
    forgiven = (FileNotFoundError, CorruptError) if repair else (FileNotFoundError,)
    with suppress(*forgiven), naming_repair(where):
        record.require_same(_record_there(path), where)


def require_complete(path: Path, record: SetRecord, networks: Iterable[Component]) -> None:
    """Check that networks have all the weights that they need, if a set is to be begun with them.

    A set that was begun with networks of this fingerprint shows that they were checked before.
    To check them again would cost the seconds in which the library that knows their names is
    imported, each time that a builder finds everything done.

    Args:
        path: folder of the set; need not exist.
        record: what is to be built there.
        networks: whose fingerprints are in the record.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `Component.require_complete`.
        StorageError: when the set record there cannot be read.
    """
    with suppress(FileNotFoundError, CorruptError):
        if _record_there(path).fingerprint == record.fingerprint:
            return
    for network in networks:
        network.require_complete()


def _record_there(path: Path) -> SetRecord:
    where = path / SET_RECORD_NAME
    return SetRecord.from_bytes(read_bytes(where, MAX_SET_RECORD_BYTES), str(where))
