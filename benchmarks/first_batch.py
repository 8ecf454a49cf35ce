"""Starting and resuming: seconds from folders to the first batch, at step 0 and at step 10⁶."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count, product
from pathlib import Path
from typing import Final

import numpy as np
from measuring.rounds import alternate, seconds
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sets import write_sets

from sdxl_distill.shards.manifest import Manifest, ShardEntry
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream

RESUME_STEP: Final = 1_000_000
BATCH: Final = 16
FIRST_BATCH_SECONDS: Final = 0.5
NOISE: Final = 0.05


READING: Final = """
A position in the stream is computed, never walked to, so a late step costs what the first one does.
A set of 10⁵ shards takes a second or two to open, since every value of its manifest is checked.
"""


def measure(small: bool) -> Iterator[Row | Curve]:
    """Open three teachers and take one batch; parse the manifest of 10⁵ shards."""
    with scratch_folder() as folder:
        folders = write_sets(
            folder,
            num_records=BATCH if small else 256,
            num_teachers=3,
            side_px=128 if small else 1024,
            records_per_shard=8,
        )
        found = alternate(
            {
                "start": seconds(_from_step_to_step(folders.teachers, 0)),
                "resume": seconds(_from_step_to_step(folders.teachers, RESUME_STEP)),
            },
            1 if small else 61,
        )
        parse = _parse_manifest(folders.teachers[0], 100 if small else 100_000)
    yield Row.of(
        "time to the first batch",
        found["start"],
        "s",
        conditions={"teachers": 3, "step": "0"},
        better="lower",
        target=FIRST_BATCH_SECONDS,
        against="from the folders' paths to the batch",
    )
    yield Row.of(
        "time to the first batch",
        found["resume"].over(found["start"]),
        "×",
        conditions={"teachers": 3, "step": "10⁶"},
        better="lower",
        target=1.0 + NOISE,
        against="the same at step 0; a twentieth is noise",
    )
    found = alternate({"parse": seconds(parse)}, 1 if small else 3)
    yield Row.of("manifest of 10⁵ shards, parsed and checked", found["parse"], "s", better="lower")


def _from_step_to_step(folders: tuple[Path, ...], first_step: int) -> Callable[[], None]:
    """Return a contender that begins one step later each time.

    Two steps differ in how many shards their first batches lie in, whatever their number.
    """
    steps = count(first_step)
    return lambda: _first_batch(folders, next(steps))


def _first_batch(folders: tuple[Path, ...], global_step: int) -> None:
    with ExitStack() as stack:
        teachers = [stack.enter_context(open_shard_set(folder)) for folder in folders]
        stream = stack.enter_context(JoinedStream(teachers, global_batch=BATCH))
        batch = next(stream.epoch(*stream.order.position_of(global_step)))
        assert len(batch) == BATCH


def _parse_manifest(folder: Path, num_shards: int) -> Callable[[], object]:
    with open_shard_set(folder) as shard_set:
        manifest = shard_set.manifest
    sides = np.arange(512, 2048, 64).tolist()
    buckets = list(product(sides, sides))[:40]
    per_bucket = -(-num_shards // len(buckets))
    shards: list[ShardEntry] = [
        manifest.shards[0]._replace(width=width, height=height, number=number)
        for width, height in buckets
        for number in range(per_bucket)
    ]
    content = Manifest(manifest.identity, 0, tuple(shards[:num_shards])).to_bytes()
    return lambda: Manifest.from_bytes(content, "manifest.json")


if __name__ == "__main__":
    run_alone(measure)
