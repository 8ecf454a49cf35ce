"""Verifies the catalog of a latents set: its segments, their rows, and that the shards follow it.

Adding images and repairing a shard follow the catalog, so a fault in it shows only in shards
that are built later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from sdxl_distill.catalog.catalog import CATALOG_FOLDER, Catalog
from sdxl_distill.catalog.row_check import wrong_rows
from sdxl_distill.catalog.segment import RESTORE_CATALOG, segment_name, segment_number
from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.shards.latents_plan import LatentsPlan, plan_faults
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.location import Location
from sdxl_distill.verify.finding import Finding, FindingList

NO_CATALOG: Final = (
    "there is no catalog: what the shards hold cannot be compared with it, and no images can be "
    "added to this set"
)


def check_catalog(
    location: Location,
    identity: SetIdentity,
    manifest: Manifest | None,
    names: Iterable[ShardName],
    *,
    quick: bool,
) -> list[Finding]:
    """Check the catalog of a latents set, as far as the damage lets it.

    Args:
        location: the set's folder.
        identity: the identity of the set.
        manifest: the set's manifest; None when it is not complete.
        names: the names of the committed shards.
        quick: True to leave out what is computed again for each row.
    """
    findings = FindingList(identity.id)
    catalog_location = location / CATALOG_FOLDER
    if not catalog_location.is_folder():
        findings.add(_fault("is missing", "the folder of its segments"))
        return findings.all()
    with findings.collecting(), catalog_location.open() as folder:
        # The segments by themselves, then their rows.
        for name in sorted(folder.names()):
            if segment_number(name) is None and not name.startswith("."):
                findings.add(_stranger(name))
        catalog = Catalog.load(folder)
        if not quick:
            _check_rows(catalog, findings)
        _check_numbers(catalog, findings)
        if manifest is not None:
            for error in plan_faults(catalog, manifest):
                findings.add(error)
        # What the committed shards need from it, where there is no manifest to say so.
        plan = LatentsPlan(catalog)
        unknown = [name for name in names if name not in plan]
        if unknown and manifest is None:
            findings.add(
                _fault(
                    f"lacks the images of {len(unknown)} shards, the first of which is "
                    f"{unknown[0]}",
                    "the catalog that the shards were planned by",
                )
            )
    return findings.all()


def is_without_catalog(location: Location, manifest: Manifest | None) -> bool:
    """Whether a set has no catalog and needs none: an earlier version packed it without one."""
    return (
        manifest is not None
        and all(entry.source_sha256 is None for entry in manifest.shards)
        and not (location / CATALOG_FOLDER).exists()
    )


def _check_rows(catalog: Catalog, findings: FindingList) -> None:
    for segment in catalog.segments:
        for key, fault in wrong_rows(segment):
            findings.add(
                _fault(fault, "what the scan of such an image gives", segment.header.n), key
            )
    for image_id in _repeated(catalog.ids):
        findings.add(_fault(f"image {image_id} has more than one row", "every image once"))


def _check_numbers(catalog: Catalog, findings: FindingList) -> None:
    """Check that the shards of each bucket are numbered without gaps, each in one segment."""
    places = np.array([(*shard.bucket, shard.number) for shard in catalog.shards])
    places = np.reshape(places, (-1, 3))
    order = np.lexsort((places[:, 2], places[:, 1], places[:, 0]))
    ordered = places[order]
    begins = np.ones(len(ordered), bool)
    begins[1:] = (ordered[1:, :2] != ordered[:-1, :2]).any(axis=1)
    expected = np.where(begins, 0, np.roll(ordered[:, 2], 1) + 1)
    for width, height, number in ordered[ordered[:, 2] != expected].tolist():
        findings.add(
            _fault(
                f"shard {number} of {width}x{height} comes twice, or the one before it is missing",
                "the numbers from 0 on, each once",
            )
        )


def _fault(found: str, expected: str, number: int | None = None) -> CorruptError:
    where = CATALOG_FOLDER if number is None else f"{CATALOG_FOLDER}/{segment_name(number)}"
    return CorruptError(found, expected=expected, where=where, action=RESTORE_CATALOG)


def _stranger(name: str) -> ConfigError:
    return ConfigError(
        f"the folder holds {name!r}, which is not a segment",
        where=CATALOG_FOLDER,
        action="move it elsewhere",
    )


def _repeated(ids: npt.NDArray[np.uint8]) -> list[str]:
    """Return each of the ids, uint8 [n, 16], that is there more than once, as 32 hex digits."""
    halves = np.frombuffer(ids.tobytes(), ">u8").astype(np.uint64)  # bytes sort far more slowly
    ordered = ids[np.lexsort((halves[1::2], halves[::2]))]
    twice = ordered[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]
    return list(dict.fromkeys(row.tobytes().hex() for row in twice))
