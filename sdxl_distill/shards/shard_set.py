"""Opens a complete shard set: reads its manifest at once, an index or a tensor when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import torch

from sdxl_distill.errors import (
    ConfigError,
    CorruptError,
    DistillError,
    IncompatibleError,
    StorageError,
)
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.index_layout import ACTION
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME, SetFolder, unless_absent
from sdxl_distill.shards.set_identity import SET_IDENTITY_NAME, SetReference
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.location import Location

T = TypeVar("T")

_CACHED_INDICES: Final = 64


def open_shard_set(path: str | Path | Location, *, max_open_shards: int = 64) -> ShardSet:
    """Open a complete shard set; reads `set.json` and `manifest.json` and no shard.

    Args:
        path: the folder of the set.
        max_open_shards: the number of shards that are kept with their indices after their use.

    Raises:
        ConfigError: when there is no set, it is not complete yet, or `path` cannot be a path.
        CorruptError: when one of the two files is damaged.
        IncompatibleError: when they do not belong together or a newer version wrote them.
        StorageError: when the operating system refuses.
    """
    location = Location(path)
    folder = SetFolder(location.look())
    identity = _read_or_explain(folder.identity, location, SET_IDENTITY_NAME)
    manifest = _read_or_explain(folder.manifest, location, MANIFEST_NAME)
    if manifest.identity != identity:
        raise IncompatibleError(
            f"a manifest of generation {manifest.identity.generation} of set "
            f"{manifest.identity.fingerprint[:12]}…",
            expected=f"generation {identity.generation} of {identity.fingerprint[:12]}…",
            where=folder.where(MANIFEST_NAME),
            action="finish building this set, or copy it again",
        )
    return ShardSet(location, manifest, max_open_shards=max_open_shards)


class ShardSet:
    """A complete set on disk, safe to share between threads; use as a context or `close` it.

    ```
    with open_shard_set("cache/teacher_predictions/teacher_v1") as shard_set:
        for name in shard_set.manifest.names():
            reader = shard_set.reader(name)
            reader.read_tensor_into(0, "teacher_pred", batch[0])
    ```

    Attributes:
        location: the folder of the set.
        folder: the door to what lies in it.
        manifest: the manifest as it was when the set was opened.
    """

    def __init__(self, location: Location, manifest: Manifest, *, max_open_shards: int) -> None:
        self.location = location
        self.folder = SetFolder(location.look())
        self.manifest = manifest
        self._indices = lru_cache(_CACHED_INDICES)(self._load_index)
        self._readers = lru_cache(max_open_shards)(self._open_reader)

    @property
    def id(self) -> str:
        """Name of the set."""
        return self.manifest.identity.id

    def index(self, name: ShardName) -> ShardIndex:
        """Return the index of a shard, checked against the manifest; the last ones are kept.

        Raises:
            KeyError: when the manifest has no such shard.
            CorruptError: when the index is missing, damaged or not the manifest's.
            StorageError: when the set was replaced since it was opened.
        """
        return self._indices(name)

    def reader(self, name: ShardName) -> ShardReader:
        """Return a shard opened for reading; the last `max_open_shards` are kept.

        Raises:
            KeyError, CorruptError, StorageError: as `index`; also for the tar.
        """
        return self._readers(name)

    def open_reader(self, name: ShardName) -> ShardReader:
        """Open a shard for a caller that keeps it; otherwise as `reader`."""
        return self._with_tar(self._load_index(name))

    def read_empty_record(self) -> dict[str, torch.Tensor]:
        """Return the embeddings of the empty caption, which a text set holds next to its shards.

        Raises:
            CorruptError: when the file is missing or not the manifest's.
        """
        where = self.folder.where(EMPTY_RECORD_NAME)
        content = unless_absent(self.folder.empty_record) or b""
        if hashlib.sha256(content).hexdigest() != self.manifest.empty_sha256:
            raise self._diagnose(CorruptError("is missing or damaged", where=where, action=ACTION))
        return RecordHeader.parse(content, where).decode(bytearray(content))

    def open_referenced(
        self, kind: Literal["latents", "text"], location: str | Path | Location | None = None
    ) -> ShardSet:
        """Open the latents or the text set that this set was made from.

        Args:
            kind: the kind of that set.
            location: the folder of that set, if it is no longer at the recorded place.

        Raises:
            ConfigError: when there is no recorded place, or no set in it.
            IncompatibleError: when another set lies there.
        """
        identity = self.manifest.identity
        reference = identity.latents if kind == "latents" else identity.text
        assert reference is not None, f"a {identity.kind} set has no {kind} set"
        found = Location(location) if location is not None else reference.resolve(self.location)
        if found is None:
            raise ConfigError(
                f"set {self.id} does not say where its {kind} set lies",
                where=str(self.location),
                action=f"name the folder of the {kind} set in the configuration",
            )
        return _open_as(found, reference, kind, self.id)

    def close(self) -> None:
        """Let go of all indices and open tars."""
        self._indices.cache_clear()
        self._readers.cache_clear()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _load_index(self, name: ShardName) -> ShardIndex:
        entry = self.manifest.entry(name)
        try:
            content = unless_absent(partial(self.folder.index_bytes, name))
            if content is None:
                raise self._missing(name.idx)
            return self._checked_index(content, name, entry)
        except CorruptError as error:
            raise self._diagnose(error) from error

    def _checked_index(self, content: bytes, name: ShardName, entry: ShardEntry) -> ShardIndex:
        """Return the index in a file, once its digest is found to be the manifest's."""
        identity = self.manifest.identity
        header = RecordHeader.build(
            identity.schema, entry.width, entry.height, identity.fingerprint, entry.source_sha256
        )
        index = ShardIndex.from_known_bytes(
            content,
            name,
            header,
            digest=entry.index_digest,
            num_records=entry.num_records,
            tar_bytes=entry.tar_bytes,
            tar_sha256=entry.tar_sha256,
        ) or ShardIndex.from_bytes(content, name)
        if ShardEntry.of(index) != entry or index.header.content != header.content:
            raise CorruptError(
                f"an index with digest {index.digest[:12]}…",
                expected=f"{entry.index_digest[:12]}…, as the manifest says",
                where=f"set {self.id}, {index.name.idx}",
                action=ACTION,
            )
        return index

    def _open_reader(self, name: ShardName) -> ShardReader:
        return self._with_tar(self.index(name))

    def _with_tar(self, index: ShardIndex) -> ShardReader:
        name = index.name
        try:
            file = unless_absent(partial(self.folder.tar, name))
            if file is None:
                raise self._missing(name.tar)
        except CorruptError as error:
            raise self._diagnose(error) from error
        if file.num_bytes != index.tar_bytes:
            raise self._diagnose(
                CorruptError(
                    f"{file.num_bytes} bytes",
                    expected=f"{index.tar_bytes} bytes",
                    where=f"set {self.id}, shard {name.tar}",
                    action=ACTION,
                )
            )
        return ShardReader(file, index, self._diagnose)

    def _missing(self, name: str) -> CorruptError:
        where = self.folder.where(name)
        return CorruptError("is missing", expected="a file", where=where, action=ACTION)

    def _diagnose(self, error: CorruptError) -> DistillError:
        """Return `error`, or the error that explains it: the set is no longer the one opened."""
        try:
            content = self.folder.manifest_bytes()
        except (FileNotFoundError, CorruptError):
            content = b""
        if content == self.manifest.to_bytes():
            return error
        return StorageError(
            f"the set was replaced while reading ({error.found})",
            expected="the manifest that was there when the set was opened",
            where=error.where,
            action="wait until the set is complete, then run again",
        )


def _open_as(location: Location, reference: SetReference, kind: str, set_id: str) -> ShardSet:
    opened = open_shard_set(location)
    found = opened.manifest.identity.fingerprint
    if found != reference.fingerprint:
        raise IncompatibleError(
            f"set {opened.id} has fingerprint {found[:12]}…",
            expected=f"{reference.fingerprint[:12]}…, the {kind} set of {set_id}",
            where=str(location),
            action=f"name the right {kind} folder in the configuration, or rebuild {set_id}",
        )
    return opened


def _read_or_explain(read: Callable[[], T], location: Location, name: str) -> T:
    try:
        return read()
    except FileNotFoundError as error:
        is_set = name == MANIFEST_NAME
        raise ConfigError(
            "this shard set is not complete yet" if is_set else "there is no shard set",
            expected=f"a file {name}",
            where=str(location),
            action="run its builder until it reports the set complete, or check the path",
        ) from error
