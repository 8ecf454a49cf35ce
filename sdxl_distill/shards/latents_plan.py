"""Which images the catalog planned for each shard of a latents set, and what became of them.

A latents shard names as its source the digest of these images' ids. This tells apart what looks
alike in a tar: an image that did not decode, a shard planned for other images, another set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from sdxl_distill.catalog.catalog import Catalog, CatalogShard
from sdxl_distill.catalog.segment import RESTORE_CATALOG, CatalogRow
from sdxl_distill.core.image_id import ids_digest, parse_record_key
from sdxl_distill.errors import DistillError, IncompatibleError
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.safetensors_layout import byte_view
from sdxl_distill.shards.shard_name import ShardName

LATENTS_ID: Final = "latents"

Ids = npt.NDArray[np.uint8]


class LatentsPlan:
    """Which images each shard of a latents set holds, by the shard's name.

    Args:
        catalog: the catalog of the images.
        unbound: the shards of an earlier version, which named no sources.
        left_out: the keys of images that are known not to decode; they explain what unbound
            shards lack. In all others the source explains it.
    """

    def __init__(
        self,
        catalog: Catalog,
        unbound: Iterable[ShardName] = (),
        left_out: Iterable[str] = (),
    ) -> None:
        self.catalog = catalog
        self._shards = {_name_of(shard): shard for shard in catalog.shards}
        self._unbound = frozenset(unbound)
        self._left_out = _ids_of(left_out)

    @classmethod
    def after(cls, catalog: Catalog, manifest: Manifest) -> LatentsPlan:
        """Return the plan of a set that exists already."""
        names = zip(manifest.names(), manifest.shards, strict=True)
        unbound = (name for name, entry in names if entry.source_sha256 is None)
        return cls(catalog, unbound, manifest.undecodable)

    @property
    def names(self) -> list[ShardName]:
        """Every shard of the catalog, in the order of its rows."""
        return list(self._shards)

    def __contains__(self, name: ShardName) -> bool:
        return name in self._shards

    def num_rows(self, name: ShardName) -> int:
        """Return how many images are planned for a shard."""
        return self._shards[name].num_rows

    def rows(self, name: ShardName) -> list[CatalogRow]:
        """Return the images of a shard in the order of their keys."""
        return self.catalog.rows(self._shards[name])

    def ids(self, name: ShardName) -> Ids:
        """Return the ids of a shard's images, uint8 [n, 16], ascending."""
        return self.catalog.shard_ids(self._shards[name])

    def source_sha256(self, name: ShardName) -> str | None:
        """Return what a shard names as its source; None for an unbound one."""
        return None if name in self._unbound else ids_digest(self.ids(name))

    def held_ids(self, name: ShardName) -> list[str]:
        """Return the ids of a shard's images except those left out, 32 hex digits each."""
        ids = self.ids(name)
        return [row.tobytes().hex() for row in ids[~_is_in(ids, self._left_out)]]

    def accepts(self, index: ShardIndex) -> bool:
        """Whether a shard holds only images of its plan, and those it lacks are accounted for."""
        planned = self.ids(index.name)
        held = _is_in(planned, index.ids)
        if np.count_nonzero(held) != index.num_records:
            return False
        if index.header.source_sha256 is None:
            return bool(_is_in(planned[~held], self._left_out).all())
        return index.header.source_sha256 == ids_digest(planned)

    def missing(self, index: ShardIndex) -> list[str]:
        """Return the keys of the images that a shard was planned for and does not hold.

        Raises:
            IncompatibleError: when it holds or was planned for other images.
        """
        if not self.accepts(index):
            raise _other_images(index.name, index.num_records)
        planned = self.ids(index.name)
        absent = planned[~_is_in(planned, index.ids)]
        return [index.name.key(image_id.tobytes().hex()) for image_id in absent]


def plan_faults(catalog: Catalog, manifest: Manifest) -> Iterator[DistillError]:
    """Yield each way in which a complete latents set is not the one that a catalog plans.

    Reads no shard: source and digest of the keys in the manifest say what a shard holds. The
    catalog may have grown since.
    """
    if manifest.catalog > catalog.n:
        yield catalog_too_short(catalog, manifest.catalog)
        return
    plan = LatentsPlan.after(catalog, manifest)
    left_out = _ids_of(manifest.undecodable)
    for name, entry in zip(manifest.names(), manifest.shards, strict=True):
        if name not in plan:
            yield _other_images(name, entry.num_records)
            continue
        ids = plan.ids(name)
        held = ids[~_is_in(ids, left_out)]
        if entry.source_sha256 != plan.source_sha256(name) or (
            entry.keys_digest != ids_digest(held)
        ):
            yield _other_images(name, entry.num_records)
    num_rows = sum(segment.header.num_rows for segment in catalog.segments[: manifest.catalog + 1])
    planned = {_name_of(shard) for shard in catalog.shards if shard.first_row < num_rows}
    for name in sorted(planned.difference(manifest.names())):
        yield IncompatibleError(
            "the catalog plans a shard that the manifest does not list",
            expected=f"the shards of catalog {manifest.catalog}",
            where=name.tar,
            action=RESTORE_CATALOG,
        )


def catalog_too_short(catalog: Catalog, n: int) -> IncompatibleError:
    """Return the error for a catalog that lacks segments whose shards exist."""
    there = f"ends with segment {catalog.n}" if catalog.segments else "is missing"
    return IncompatibleError(
        f"the catalog {there}, but there are shards of catalog {n}",
        expected=f"segments 0 to {n}, which say what is in these shards",
        where="catalog",
        action=RESTORE_CATALOG,
    )


def _name_of(shard: CatalogShard) -> ShardName:
    return ShardName(LATENTS_ID, *shard.bucket, shard.number)


def _other_images(name: ShardName, num_records: int) -> IncompatibleError:
    return IncompatibleError(
        f"{num_records} records of images that the catalog does not plan for this shard, or not "
        "all of those that it plans",
        expected="the images of this shard in the catalog, except those that did not decode",
        where=name.tar,
        action=f"{RESTORE_CATALOG}; if the catalog is the right one, build_latents --repair "
        "builds this shard again",
    )


def _ids_of(keys: Iterable[str]) -> Ids:
    digits = "".join(sorted(parse_record_key(key)[0] for key in keys))
    return np.reshape(np.frombuffer(bytes.fromhex(digits), np.uint8), (-1, 16))


def _is_in(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Return bool [n]: which ids, uint8 [n, 16], are among the others, which are ascending."""
    if not len(others):
        return np.zeros(len(ids), np.bool_)
    rows, sorted_rows = _as_rows(ids), _as_rows(others)
    places = np.searchsorted(sorted_rows, rows).clip(max=len(sorted_rows) - 1)
    return sorted_rows[places] == rows


def _as_rows(ids: Ids) -> npt.NDArray[np.bytes_]:
    """Return ids as comparable rows [n], without a copy: plans compare them shard by shard."""
    return np.frombuffer(byte_view(ids), np.dtype("S16"))
