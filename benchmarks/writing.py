"""Writing a shard: encode, tar, digests, SHA-256, index and fsync, against a bare file write."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

from measuring.rounds import alternate, seconds
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sets import random_record

from sdxl_distill.core.image_id import image_id
from sdxl_distill.shards.record import Layout, RecordHeader, predictions_schema
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory

WRITE_TARGET: Final = 0.5
DISTINCT_RECORDS: Final = 16
_NO_SHA256: Final = "0" * 64


READING: Final = """
webdataset's `TarWriter` hands each member on whole, and SHA-256 runs in a thread beside the
writing. What is left is the encoding, two copies, and the hash itself when no core is free for it:
on a busy machine the ratio was half of that on a quiet one.
"""


def measure(small: bool) -> Iterator[Row | Curve]:
    """Write shards of both layouts, and see what memory the length of a shard costs."""
    side_px, num_records = (128, 16) if small else (1024, 512)
    with scratch_folder() as folder:
        for layout in ("full", "compact"):
            shard = _Shard(folder / layout, layout, side_px)
            found = alternate(
                {
                    "shard": seconds(lambda shard=shard: shard.write(num_records)),
                    "bare": seconds(lambda shard=shard: shard.write_bare(num_records)),
                },
                1 if small else 7,
            )
            conditions = {"layout": layout, "records": num_records}
            yield Row.of(
                "write a shard: against a bare write",
                found["bare"].over(found["shard"]),
                "×",
                conditions=conditions,
                target=WRITE_TARGET,
                against="write + fsync of the same bytes to one file",
            )
            megabytes = num_records * shard.record_bytes / 1e6
            rate = found["shard"].rate_of(megabytes)
            yield Row.of("write a shard: MB/s", rate, "MB/s", conditions=conditions)
        shard = _Shard(folder / "memory", "full", side_px)
        peaks = [_peak_mebibytes(shard, length) for length in (num_records // 4, num_records)]
    yield Row(
        f"memory beyond that of a shard of {num_records // 4} records",
        peaks[1] - peaks[0],
        "MiB",
        1.0,
        "lower",
        f"peak {peaks[1]:.1f} MiB against {peaks[0]:.1f} MiB",
        None,
        {"layout": "full", "records": num_records},
    )


class _Shard:
    """Writes shards of the same records again and again.

    Args:
        folder: to write to.
        layout: of the records.
        side_px: of the images.
    """

    def __init__(self, folder: Path, layout: Layout, side_px: int) -> None:
        schema = predictions_schema(layout, "F16", 4, 77, 2048, 1280)
        self._directory = Directory(folder, create=True)
        self._side_px = side_px
        self._header = RecordHeader.build(schema, side_px, side_px, _NO_SHA256, _NO_SHA256)
        self._records = [random_record(self._header, row) for row in range(DISTINCT_RECORDS)]
        self._content = [self._header.encode(record) for record in self._records]
        self._numbers = count()

    @property
    def record_bytes(self) -> int:
        """Size of one record."""
        return self._header.record_bytes

    def write(self, num_records: int) -> None:
        """Write a shard as the builders do, and remove it."""
        name = ShardName("teacher", self._side_px, self._side_px, next(self._numbers))
        digest = 1 if self._header.recreates_noise else None
        ids = sorted(image_id(str(row).encode()) for row in range(num_records))
        with self._directory.stage() as staged:
            writer = ShardWriter(staged, name, self._header)
            for row, record_id in enumerate(ids):
                record = self._header.encode(self._records[row % DISTINCT_RECORDS])
                writer.write(name.key(record_id), record, noise_digest=digest)
            index = writer.close()
            self._directory.publish(staged, name.tar)
        self._directory.publish_bytes(name.idx, index.to_bytes())
        self._directory.remove(name.tar)
        self._directory.remove(name.idx)

    def write_bare(self, num_records: int) -> None:
        """Write the records' bytes to one file, and remove it."""
        path = self._directory.path / "bare"
        with path.open("wb") as file:
            for row in range(num_records):
                file.write(self._content[row % DISTINCT_RECORDS])
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


def _peak_mebibytes(shard: _Shard, num_records: int) -> float:
    tracemalloc.start()
    shard.write(num_records)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak_bytes / 2**20


if __name__ == "__main__":
    run_alone(measure)
