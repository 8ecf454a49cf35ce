"""What a builder prints at its end: the set, this worker's part in it, and what was left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdxl_distill.builder.set_builder import BuiltSet
    from sdxl_distill.catalog.growth import ScanReport
    from sdxl_distill.storage.location import Location

_MAX_NAMES = 5


def print_build_summary(location: Location | str, built: BuiltSet) -> None:
    """Print the size of a complete set and what this worker did for it."""
    manifest, summary = built.manifest, built.summary
    num_bytes = sum(entry.tar_bytes for entry in manifest.shards)
    draws = f", {manifest.draws} draws" if manifest.draws > 1 else ""
    print(
        f"{location}: {manifest.num_records:,} records in {len(manifest.shards):,} shards{draws}, "
        f"{format_bytes(num_bytes)}, complete"
    )
    if summary.num_built:
        print(
            f"  built here: {summary.num_built} shards, {summary.num_records:,} records in "
            f"{summary.seconds:.1f} s ({summary.records_per_second:.1f} records/s)"
        )
    counts = {
        "were there before": summary.num_present,
        "adopted from a worker that died": summary.num_adopted,
        "claims taken over": summary.num_taken_over,
        "built twice": summary.num_duplicates,
        "of these with other bytes (another GPU type or library version)": (
            summary.num_differing_duplicates
        ),
        "dropped and offered again": summary.num_dropped,
    }
    for meaning, count in counts.items():
        if count:
            print(f"  {count} {meaning}")


def print_scan_report(report: ScanReport, undecodable: tuple[str, ...]) -> None:
    """Print what a scan found, and every kind of image that needs a look."""
    print(
        f"images: {report.num_images:,} ({report.num_new:,} new, "
        f"{report.num_duplicates:,} duplicates), {report.num_empty_captions:,} without caption"
    )
    for bucket, count in sorted(report.new_per_bucket.items()):
        print(f"  {bucket.width}x{bucket.height}: {count:,} new")
    bad = [f"{image.source} ({image.reason})" for image in report.bad_images]
    _print_names("bad images left out", bad)
    _print_names("images that did not decode, left out", undecodable)
    _print_names("duplicates with differing captions", report.differing_captions)
    _print_names("captions changed since they were built (the old ones stay)",
                 report.changed_captions)  # fmt: skip
    _print_names("images deleted since they were built (their records stay)", report.deleted)


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def _print_names(meaning: str, names: tuple[str, ...] | list[str]) -> None:
    if names:
        print(f"  {len(names):,} {meaning}:")
        for name in names[:_MAX_NAMES]:
            print(f"    {name}")
        if len(names) > _MAX_NAMES:
            print(f"    … and {len(names) - _MAX_NAMES:,} more")
