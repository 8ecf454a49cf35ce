"""The catalog of a latents set, before any work: is it complete, and did it plan these shards?

Without it a scan would plan the same images for other shards: the existing ones would lose images
or get them twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from sdxl_distill.builder.withdrawal import folders_to_repair_from
from sdxl_distill.catalog.catalog import CATALOG_FOLDER, Catalog
from sdxl_distill.catalog.segment import RESTORE_CATALOG
from sdxl_distill.errors import CorruptError, DistillError, IncompatibleError
from sdxl_distill.shards.latents_plan import LatentsPlan, catalog_too_short, plan_faults
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.set_folder import SetFolder, shard_names
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.location import Location


def load_bound_catalog(
    location: Location, identity: SetIdentity, *, repair: bool = False
) -> Catalog:
    """Load the catalog of a set, and check that the set's shards were planned by it.

    Args:
        location: the folder of the set; need not exist.
        identity: the identity of the set.
        repair: accept shards that were planned for other images, since they will be built again;
            those that the catalog does not know are still refused.

    Raises:
        IncompatibleError: when it is missing, shorter than the set, or another set's.
        CorruptError: when a segment is missing or damaged.
        StorageError: when the disk refuses.
    """
    # The set first, then its catalog: another launch may publish a segment and then shards.
    manifest, names = _manifest_of(location, identity), sorted(_existing_shards(location, identity))
    catalog, catalog_location = Catalog(), location / CATALOG_FOLDER
    if catalog_location.is_folder():
        with catalog_location.open() as folder:
            catalog = Catalog.load(folder)
    plan, where = LatentsPlan(catalog), str(catalog_location)
    if manifest is not None and manifest.catalog > catalog.n:
        error = catalog_too_short(catalog, manifest.catalog)
        raise IncompatibleError(
            error.found, expected=error.expected, where=where, action=error.action
        )
    unknown = [name for name in names if name not in plan]
    if unknown:
        raise IncompatibleError(
            f"the catalog knows {catalog.num_images} images, but not those of {len(unknown)} "
            f"existing shards, the first of which is {unknown[0]}",
            expected="the catalog that the shards were planned by",
            where=where,
            action=RESTORE_CATALOG,
        )
    if manifest is not None and not repair:
        _require_no_fault(list(plan_faults(catalog, manifest)), location)
    return catalog


def latents_plan(location: Location, identity: SetIdentity, catalog: Catalog) -> LatentsPlan:
    """Return what a catalog plans for a set; shards of earlier versions stay as they are."""
    manifest = _manifest_of(location, identity)
    if manifest is not None:
        return LatentsPlan.after(catalog, manifest)
    plan = LatentsPlan(catalog)
    return LatentsPlan(catalog, _unbound_shards(location, identity, plan))


def _require_no_fault(faults: list[DistillError], location: Location) -> None:
    if not faults:
        return
    first = faults[0]
    more = f" (and {len(faults) - 1} more shards)" if len(faults) > 1 else ""
    raise type(first)(
        f"{first.where}: {first.found}{more}",
        expected=first.expected,
        where=str(location),
        action=first.action,
    )


def _manifest_of(location: Location, identity: SetIdentity) -> Manifest | None:
    """Return the manifest of a set, even one that a repair set aside; None: none can be read."""
    for folder in (location, *folders_to_repair_from(location)):
        with suppress(FileNotFoundError, CorruptError):
            manifest = SetFolder(folder.look()).manifest()
            if manifest.identity.fingerprint == identity.fingerprint:
                return manifest
    return None


def _existing_shards(location: Location, identity: SetIdentity) -> set[ShardName]:
    if not location.is_folder():
        return set()
    with location.open() as directory:
        return shard_names(directory.names(), identity.id)


def _unbound_shards(
    location: Location, identity: SetIdentity, plan: LatentsPlan
) -> Iterator[ShardName]:
    """Yield the committed shards that name no source, in a set that lost its manifest.

    Only those that hold all images of their plan: what any other one misses cannot be told. The
    first existing shard tells the version; in a set of this version no other index is read.
    """
    folder, existing = SetFolder(location.look()), _existing_shards(location, identity)
    for name in (name for name in plan.names if name in existing):
        index = None
        with suppress(FileNotFoundError, CorruptError):
            index = folder.index(name)
        if index is None:
            continue
        if index.header.source_sha256 is not None:
            return
        if index.keys_digest == plan.source_sha256(name):
            yield name
