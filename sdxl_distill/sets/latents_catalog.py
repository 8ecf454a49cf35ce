"""The catalog of a latents set before any work: is it there, whole, and that of these shards?

Without it a scan would plan the same images for other shards: those that are there would lose
images, or get them twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sdxl_distill.builder.withdrawal import folders_to_repair_from
from sdxl_distill.catalog.catalog import CATALOG_FOLDER, Catalog
from sdxl_distill.catalog.segment import RESTORE_CATALOG
from sdxl_distill.errors import CorruptError, DistillError, IncompatibleError
from sdxl_distill.limits import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.latents_plan import LatentsPlan, catalog_too_short, plan_faults
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.regular_file import read_bytes


def load_bound_catalog(path: Path, identity: SetIdentity, *, repair: bool = False) -> Catalog:
    """Load the catalog of a set, and check that the set's shards were planned by it.

    Args:
        path: folder of the set; need not exist.
        identity: of the set.
        repair: shards that were planned for other images are no fault, since they will be built
            again; those that the catalog does not know are.

    Raises:
        IncompatibleError: when it is missing, shorter than the set, or another one.
        CorruptError: when a segment is missing or damaged.
        StorageError: when the disk refuses.
    """
    # In this order: another launch may publish a segment and then shards in the meantime.
    manifest, names = _manifest_of(path, identity), sorted(_existing_shards(path, identity))
    catalog = Catalog()
    if (path / CATALOG_FOLDER).is_dir():
        with Directory(path / CATALOG_FOLDER) as folder:
            catalog = Catalog.load(folder)
    plan, where = LatentsPlan(catalog), str(path / CATALOG_FOLDER)
    if manifest is not None and manifest.catalog > catalog.n:
        error = catalog_too_short(catalog, manifest.catalog)
        raise IncompatibleError(
            error.found, expected=error.expected, where=where, action=error.action
        )
    unknown = [name for name in names if name not in plan]
    if unknown:
        raise IncompatibleError(
            f"the catalog knows {catalog.num_images} images, but not those of {len(unknown)} "
            f"shards that are there, the first of which is {unknown[0]}",
            expected="the catalog that the shards were planned by",
            where=where,
            action=RESTORE_CATALOG,
        )
    if manifest is not None and not repair:
        _require_no_fault(list(plan_faults(catalog, manifest)), path)
    return catalog


def latents_plan(path: Path, identity: SetIdentity, catalog: Catalog) -> LatentsPlan:
    """Return what a catalog plans for a set; shards of earlier versions stay as they are."""
    manifest = _manifest_of(path, identity)
    if manifest is not None:
        return LatentsPlan.after(catalog, manifest)
    plan = LatentsPlan(catalog)
    return LatentsPlan(catalog, _unbound_shards(path, identity, plan))


def _require_no_fault(faults: list[DistillError], path: Path) -> None:
    if not faults:
        return
    first = faults[0]
    more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
    raise type(first)(
        f"{first.where}: {first.found}{more}",
        expected=first.expected,
        where=str(path),
        action=first.action,
    )


def _manifest_of(path: Path, identity: SetIdentity) -> Manifest | None:
    """Return the manifest of a set, also while a repair has it aside; None: none can be read."""
    for folder in (path, *folders_to_repair_from(path)):
        where = folder / MANIFEST_NAME
        with suppress(FileNotFoundError, CorruptError):
            manifest = Manifest.from_bytes(read_bytes(where, MAX_MANIFEST_BYTES), str(where))
            if manifest.identity.fingerprint == identity.fingerprint:
                return manifest
    return None


def _existing_shards(path: Path, identity: SetIdentity) -> Iterator[ShardName]:
    if path.is_dir():
        with Directory(path) as directory:
            found = {ShardName.parse(name, identity.id) for name in directory.names()}
        yield from (name for name in found if name is not None)


def _unbound_shards(path: Path, identity: SetIdentity, plan: LatentsPlan) -> Iterator[ShardName]:
    """Yield the committed shards that name no source, in a set that lost its manifest.

    Only those that hold all images of their plan: of no other one can be told what is missing.
    The first shard there tells the version; the indices of a set of this one need no reading.
    """
    there = set(_existing_shards(path, identity))
    for name in (name for name in plan.names if name in there):
        index = None
        with suppress(FileNotFoundError, CorruptError):
            index = ShardIndex.from_bytes(read_bytes(path / name.idx, MAX_INDEX_BYTES), name)
        if index is None:
            continue
        if index.header.source_sha256 is not None:
            return
        if index.keys_digest == plan.source_sha256(name):
            yield name
