"""Bytes: what one image takes on disk, by number of teachers and layout, all files counted.

Sets of 512 images at 1024² are written and their folders weighed: tars, indices and JSON. Loose
files and the peers' formats are weighed alike; a lossless step is tried on top.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from measuring.peer_process import PeerError, start_peers
from measuring.rounds import alternate, seconds
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sets import SetFolders, write_sets

from sdxl_distill.shards.shard_set import open_shard_set

NUM_TEACHERS: Final = tuple(range(1, 9))
COMPACT_TARGET_MB: Final = 0.85
FIGURE: Final = "Megabytes per image at 1024²"
PEERS: Final = {
    "loose_files": "loose files",
    "mosaic": "MosaicML streaming (MDS)",
    "lit": "LitData chunks",
    "memory_map": "one memory-mapped file, joined beforehand",
}
_SIDE_PX: Final = 1024


READING: Final = """
A lossless step on float16 does not pay here: with the bytes of low and high significance apart,
deflating the latter saves an eighth of random normal values, and one thread inflates a few hundred
MB/s, far less than it joins. Real text embeddings and predictions were not available to try.
"""


def measure(small: bool) -> Iterator[Row | Curve]:
    """Weigh both layouts, the peers' files, and planes of bytes after zlib."""
    num_records = 16 if small else 512
    side_px = 128 if small else _SIDE_PX
    lines: dict[str, list[tuple[float, float]]] = {}
    for layout in ("full", "compact"):
        with scratch_folder() as folder:
            folders = write_sets(
                folder,
                num_records=num_records,
                num_teachers=max(NUM_TEACHERS),
                layout=layout,
                side_px=side_px,
                records_per_shard=512,
            )
            lines[layout] = [(each, _megabytes(folders, each)) for each in NUM_TEACHERS]
            if layout == "compact":
                yield from _lossless(folders, small)
    for layout, points in lines.items():
        for num_teachers, megabytes in points:
            is_target = layout == "compact" and num_teachers == 3 and not small
            yield Row(
                "bytes per image",
                megabytes,
                "MB",
                COMPACT_TARGET_MB if is_target else None,
                "lower",
                "latents, text, predictions; tars, indices, JSON",
                None,
                {"files": f"layout {layout}", "teachers": int(num_teachers)},
            )
    yield Curve(FIGURE, "teachers", "MB per image", lines)
    yield from _peers(num_records // 8, side_px, small=small)


def _megabytes(folders: SetFolders, num_teachers: int) -> float:
    num_bytes = sum(_weight(folder) for folder in folders.sets(num_teachers))
    return num_bytes / folders.num_records / 1e6


def _weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peers(num_records: int, side_px: int, *, small: bool) -> Iterator[Row]:
    with scratch_folder() as folder:
        write_sets(folder, num_records=num_records, num_teachers=3, side_px=side_px)
        for script, process in start_peers(PEERS, folder, small=small):
            metric, conditions = "bytes per image", {"files": PEERS[script], "teachers": 3}
            if isinstance(process, PeerError):
                yield Row.missing(metric, "MB", str(process), conditions)
                continue
            process.close()
            megabytes = _weight(folder / script) / num_records / 1e6
            yield Row(metric, megabytes, "MB", None, "lower", "its files alone", None, conditions)


def _lossless(folders: SetFolders, small: bool) -> Iterator[Row]:
    """Split float16 values into planes of high and low bytes and deflate the high ones."""
    for tensor, folder in (("teacher_pred", folders.teachers[0]), ("text", folders.text)):
        assert folder is not None
        name = "encoder_hidden_states" if tensor == "text" else tensor
        values = _tensors(folder, name, 4 if small else 16)
        planes = [np.ascontiguousarray(each.view(np.uint8)[1::2]) for each in values]
        packed = [zlib.compress(plane.tobytes(), 1) for plane in planes]
        num_bytes = sum(each.nbytes for each in values)
        kept = sum(map(len, packed)) + num_bytes / 2
        yield Row(
            "lossless, high bytes deflated",
            kept / num_bytes,
            "×",
            None,
            "lower",
            "random normal values, the worst case but one for predictions",
            None,
            {"files": name},
        )
        found = alternate(
            {"unpack": seconds(lambda packed=packed: list(map(zlib.decompress, packed)))},
            1 if small else 5,
        )
        yield Row.of(
            "lossless, high bytes inflated",
            found["unpack"].rate_of(num_bytes / 1e6),
            "MB/s",
            conditions={"files": name},
            against="one thread; a copy alone does thousands",
        )


def _tensors(folder: Path, name: str, limit: int) -> Sequence[np.ndarray]:
    with open_shard_set(folder) as shard_set:
        reader = shard_set.reader(shard_set.manifest.names()[0])
        records = range(min(limit, reader.index.num_records))
        return [reader.read_record(record)[name].numpy().reshape(-1) for record in records]


if __name__ == "__main__":
    run_alone(measure)
