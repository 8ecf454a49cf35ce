"""Loose folders: one file per record, named as in the tars, all buckets and draws together.

`{image_id}_{W}x{H}.safetensors`, `…_d{k}.safetensors` for draw k ≥ 1, a sidecar `.json` next to
latents, and the `set.json` of the set they were unpacked from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from sdxl_distill.catalog.catalog import CATALOG_FOLDER
from sdxl_distill.errors import ConfigError
from sdxl_distill.limits import MAX_DRAWS
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME
from sdxl_distill.shards.shard_name import ShardName, is_bucket_side
from sdxl_distill.shards.shard_set import EMPTY_RECORD_NAME
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

_NAME: Final = re.compile(
    r"([0-9a-f]{32})_([1-9]\d{1,4})x([1-9]\d{1,4})(?:_d([1-9]\d{0,3}))?\.(safetensors|json)",
    re.ASCII,
)
_SHARD_SUFFIXES: Final = (".tar", ".idx")


class LooseRecord(NamedTuple):
    """One record's file; sorts as records do in shards of one bucket and draw."""

    width: int
    height: int
    draw: int
    image_id: str

    @property
    def stem(self) -> str:
        """Name of the file up to its extension."""
        return ShardName("", self.width, self.height, 0, self.draw).member_stem(self.image_id)

    @property
    def file_name(self) -> str:
        """Name of the file."""
        return f"{self.stem}.safetensors"

    @property
    def sidecar_name(self) -> str:
        """Name of the sidecar, which only latents have."""
        return f"{self.stem}.json"


@dataclass(frozen=True)
class LooseFolder:
    """The content of a loose folder, by names alone.

    Attributes:
        records: the records, sorted.
        sidecars: the names of the `.json` files that belong to a record.
        strangers: every other name, sorted; those with a leading dot are left out.
    """

    records: tuple[LooseRecord, ...]
    sidecars: frozenset[str]
    strangers: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> LooseFolder:
        """Sort out the names of a folder."""
        records: list[LooseRecord] = []
        others: set[str] = set()
        for name in names:
            record = _parse(name)
            if record is not None and name == record.file_name:
                records.append(record)
            elif not name.startswith("."):
                others.add(name)
        sidecars = others.intersection(record.sidecar_name for record in records)
        strangers = others - sidecars - {SET_IDENTITY_NAME, EMPTY_RECORD_NAME, CATALOG_FOLDER}
        return cls(tuple(sorted(records)), frozenset(sidecars), tuple(sorted(strangers)))

    @property
    def num_draws(self) -> int:
        """One more than the highest draw of any record."""
        return 1 + max((record.draw for record in self.records), default=0)


def is_loose(names: Iterable[str]) -> bool:
    """Whether a folder with these names holds loose records and no shards."""
    has_records = False
    for name in names:
        if name.endswith(_SHARD_SUFFIXES):
            return False
        has_records = has_records or _parse(name) is not None
    return has_records


def open_new_folder(location: Location) -> Directory:
    """Make a folder to be filled, or open an empty one.

    Raises:
        ConfigError: when it is not empty: nothing is ever overwritten.
        StorageError: when it cannot be made.
    """
    # It must be empty, so one process fills it alone: any file system is good enough.
    directory = location.open(create=True, exclusive=True)
    num_names = len(directory.names())
    if num_names:
        directory.close()
        raise ConfigError(
            f"the folder holds {num_names} files",
            expected="a new or empty folder",
            where=str(location),
            action="choose another folder, or remove what an interrupted run left there",
        )
    return directory


def _parse(name: str) -> LooseRecord | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    width, height, draw = (int(digits or 0) for digits in match.groups()[1:4])
    if not (is_bucket_side(width) and is_bucket_side(height) and draw < MAX_DRAWS):
        return None
    return LooseRecord(width, height, draw, match[1])
