"""Whether the rows of a segment are ones that a scan could write; they are not trusted.

Columns that names, paths and sizes are made of are checked whenever a segment is read, as a whole.
Columns that follow from others are computed again by the verifier, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_distill.catalog.segment import RESTORE_CATALOG, Segment, to_rows
from sdxl_distill.core.bucket import cover_crop
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_SHARDS, MAX_SIDE_PX

_ID: Final = "^[0-9a-f]{32}$"
_NO_NUL: Final = r"\A[^\x00]*\z"
_PLACE_COLUMNS: Final = ("bucket_width", "bucket_height", "shard")
_ROWS_AT_ONCE: Final = 4096


def row_places(table: pa.Table) -> npt.NDArray[np.int32]:
    """Return bucket width, bucket height and shard of each row, int32 [N, 3]."""
    return np.stack([table[name].to_numpy() for name in _PLACE_COLUMNS], axis=1)


def require_legal_rows(table: pa.Table, where: str) -> None:
    """Check columns that names, paths and sizes are made of, and that rows are sorted.

    Args:
        table: the rows of one segment.
        where: the segment's name in errors.

    Raises:
        CorruptError: naming the first column with a value that no scan writes.
    """
    # Each column by itself.
    places = row_places(table)
    sides, shards = places[:, :2], places[:, 2]
    is_legal = {
        "image_id": _all_match(table["image_id"], _ID),
        "source": _all_match(table["source"], _NO_NUL),
        "bucket": bool(((sides > 0) & (sides <= MAX_SIDE_PX) & (sides % 8 == 0)).all()),
        "shard": bool(((shards >= 0) & (shards < MAX_SHARDS)).all()),
        "captions": all(
            bool((piece.value_lengths().to_numpy() > 0).all()) for piece in table["captions"].chunks
        ),
    }
    illegal = next((name for name, legal in is_legal.items() if not legal), None)
    if illegal is not None:
        raise CorruptError(f"an illegal {illegal}", where=where, action=RESTORE_CATALOG)
    # The order of the rows.
    if not _are_sorted(places, table["image_id"]):
        raise CorruptError(
            "rows out of order, or an image twice in a shard",
            expected="rows sorted by bucket, shard and image id",
            where=where,
            action=RESTORE_CATALOG,
        )


def wrong_rows(segment: Segment) -> Iterator[tuple[str, str]]:
    """Yield key and fault of every row whose columns contradict each other.

    Crop, digest of the captions and subset follow from size, bucket, captions and source.
    """
    for start in range(0, segment.table.num_rows, _ROWS_AT_ONCE):
        part = segment.table.slice(start, _ROWS_AT_ONCE)
        digests, subsets = (part[name].to_pylist() for name in ("captions_sha256", "subset"))
        for row, digest, subset in zip(to_rows(part), digests, subsets, strict=True):
            if min(row.width, row.height) < 1 or row.crop != cover_crop(
                row.width, row.height, row.bucket
            ):
                yield row.key, "the crop is not the one that follows from its size and bucket"
            if digest != row.captions_sha256:
                yield row.key, "the digest is not that of its captions"
            if subset != row.subset:
                yield row.key, "the subset is not the folder of its source"


def _are_sorted(places: npt.NDArray[np.int32], ids: pa.ChunkedArray) -> bool:
    before, after = places[:-1], places[1:]
    rises = np.zeros(len(before), bool)
    ties = np.ones(len(before), bool)
    for column in range(places.shape[1]):
        rises |= ties & (before[:, column] < after[:, column])
        ties &= before[:, column] == after[:, column]
    id_rises = pc.call_function("less", [ids.slice(0, len(ids) - 1), ids.slice(1)])
    return bool((rises | ties & id_rises.to_numpy()).all())


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    options = pc.MatchSubstringOptions(pattern)
    matches = pc.call_function("match_substring_regex", [column], options)
    return bool(matches.to_numpy().all())
