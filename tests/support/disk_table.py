"""Disk space of a cache, computed from the record schemas: the table in docs/sizing.md.

`python tests/support/disk_table.py` prints it; tests/test_readme.py compares the two.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sdxl_distill.fingerprint import canonical_json
from sdxl_distill.shards.index import tar_layout
from sdxl_distill.shards.record import (
    Layout,
    RecordHeader,
    RecordSchema,
    latents_schema,
    predictions_schema,
    text_schema,
)

NUM_IMAGES: Final = 100_000
RECORDS_PER_SHARD: Final = 512
COLUMNS: Final[tuple[tuple[int, Layout], ...]] = (
    (512, "full"),
    (512, "compact"),
    (1024, "full"),
    (1024, "compact"),
)
NUM_TEACHERS: Final = (1, 2, 3, 4, 6, 8)
CHANNELS, TOKENS, HIDDEN_SIZE, POOLED_SIZE = 4, 77, 2048, 1280
_SHA256: Final = "0" * 64
# An index holds of each record: id, offset, two sizes and the digest of header and sidecar;
# besides them 8 bytes for each tensor, and for the noise where that is re-created.
_INDEX_BYTES: Final = 16 + 8 + 2 * 8 + 8
_SIDECAR: Final = canonical_json(
    {
        "captions": ["about seventy words of caption " * 14],
        "crop": {"left": 256, "resized_height": 1024, "resized_width": 1536, "top": 0},
        "original_height": 4000,
        "original_width": 6000,
        "source": "holidays/2024/IMG_0001.jpg",
        "subset": "holidays/2024",
    }
)


def image_bytes(
    schema: RecordSchema, side: int, source: str | None = _SHA256, sidecar: bytes = b""
) -> float:
    """Return what one image adds to tar and index of full shards of `side` × `side` pixels."""
    header = RecordHeader.build(schema, side, side, _SHA256, source)
    sidecar_sizes = np.full(RECORDS_PER_SHARD, len(sidecar), np.int64)
    _, tar_bytes = tar_layout(header.record_bytes, sidecar_sizes)
    num_digests = len(header.places) + header.recreates_noise
    return tar_bytes / RECORDS_PER_SHARD + _INDEX_BYTES + 8 * num_digests


def latents_bytes(side: int) -> float:
    """Return what an image takes in the latents set."""
    return image_bytes(latents_schema(CHANNELS), side, source=None, sidecar=_SIDECAR)


def text_bytes(side: int) -> float:
    """Return what an image takes in the text set."""
    return image_bytes(text_schema(TOKENS, HIDDEN_SIZE, POOLED_SIZE), side)


def predictions_bytes(side: int, layout: Layout) -> float:
    """Return what one draw of an image takes in one teacher's predictions set."""
    sizes = (CHANNELS, TOKENS, HIDDEN_SIZE, POOLED_SIZE)
    return image_bytes(predictions_schema(layout, "F16", *sizes), side)


def table() -> str:
    """Return GB (10⁹ bytes) of all sets of `NUM_IMAGES` images with one draw, as Markdown."""
    head = [f"{side}², {layout}" for side, layout in COLUMNS]
    lines = ["| teachers | " + " | ".join(head) + " |", "|---:" * (1 + len(head)) + "|"]
    for count in NUM_TEACHERS:
        sizes = [
            latents_bytes(side) + text_bytes(side) + count * predictions_bytes(side, layout)
            for side, layout in COLUMNS
        ]
        cells = [f"{NUM_IMAGES * size / 1e9:.0f}" for size in sizes]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
