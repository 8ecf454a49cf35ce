"""The catalog of a latents set next to its loose files, so that packing gives the same set again.

`catalog/` in a loose folder holds the segments, and a `manifest.json` that says which shards the
set had and which images did not decode. Without it nothing says which shard an image was in.
"""

from __future__ import annotations

from typing import NamedTuple

from sdxl_distill.catalog.catalog import CATALOG_FOLDER, Catalog
from sdxl_distill.catalog.segment import segment_name
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.limits import MAX_SEGMENT_BYTES
from sdxl_distill.shards.latents_plan import LatentsPlan, plan_faults
from sdxl_distill.shards.manifest import MANIFEST_NAME, Manifest
from sdxl_distill.shards.set_folder import SetFolder
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.storage.location import Location


class LooseCatalog(NamedTuple):
    """What a latents set was before it was unpacked."""

    manifest: Manifest
    plan: LatentsPlan


def has_catalog(location: Location) -> bool:
    """Whether a folder, of a set or of loose files, holds a catalog."""
    return (location / CATALOG_FOLDER).is_folder()


def copy_catalog(source: Location, target: Location, manifest: Manifest | None = None) -> None:
    """Copy the segments of a catalog, checked, and the manifest next to them if one is given.

    Raises:
        CorruptError, IncompatibleError: when the catalog is damaged or incomplete.
        StorageError: when the disk refuses.
    """
    with (
        (source / CATALOG_FOLDER).open() as original,
        (target / CATALOG_FOLDER).open(create=True) as copy,
    ):
        for n in range(Catalog.load(original).n + 1):
            name = segment_name(n)
            copy.publish_bytes(name, original.read(name, MAX_SEGMENT_BYTES))
        if manifest is not None:
            copy.publish_bytes(MANIFEST_NAME, manifest.to_bytes())


def read_loose_catalog(location: Location, identity: SetIdentity) -> LooseCatalog:
    """Read the catalog of a loose folder.

    Raises:
        CorruptError: when it is damaged, or its manifest is missing.
        IncompatibleError: when catalog and manifest do not belong to this set, or together.
    """
    action = "unpack the set again, or remove the folder `catalog`; images cannot be added then"
    with (location / CATALOG_FOLDER).open() as folder:
        catalog, where = Catalog.load(folder), folder.where(MANIFEST_NAME)
        try:
            manifest = SetFolder(folder).manifest()
        except FileNotFoundError as error:
            raise CorruptError("is missing", where=where, action=action) from error
    if manifest.identity.fingerprint != identity.fingerprint:
        raise IncompatibleError(
            f"the manifest of set {manifest.identity.fingerprint[:12]}…",
            expected=f"{identity.fingerprint[:12]}…, as set.json says",
            where=where,
            action=action,
        )
    for error in plan_faults(catalog, manifest):
        raise error
    return LooseCatalog(manifest, LatentsPlan.after(catalog, manifest))
