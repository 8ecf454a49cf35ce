"""Joining very many shards: 24 buckets of 96 shards against 24 of one, record for record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Final

from measuring.rounds import alternate, seconds
from measuring.row import Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sets import write_sets

from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream

NUM_BUCKETS: Final = 24
NUM_SHARDS: Final = 96  # of each bucket
RECORDS_PER_SHARD: Final = 4
NUM_TEACHERS: Final = 3
BATCH: Final = 8
RATE_TARGET: Final = 0.8
# name → height and width, and size of the text embeddings
RECORDS: Final = {"tiny": (64, 64), "with SDXL's text": (64, 2048)}

READING: Final = """
Shards of four records are the worst case: in the first epoch each index is read for the sake of
four records, later none is. Shards of 512 records, the default, read an index for 512.
"""


def measure(small: bool) -> Iterator[Row]:
    """Join by one thread, hot: the first epoch, for which every shard is opened, and later ones."""
    for what, (side_px, hidden_size) in RECORDS.items():
        with scratch_folder() as folder, ExitStack() as stack:
            num_buckets, num_shards = (2, 2) if small else (NUM_BUCKETS, NUM_SHARDS)
            sets = {
                name: _write(
                    folder / name, num_buckets, num_shards, per_shard, side_px, hidden_size
                )
                for name, per_shard in (
                    ("many", RECORDS_PER_SHARD),
                    ("one", RECORDS_PER_SHARD * num_shards),
                )
            }
            num_rounds = 1 if small else 3
            conditions = {"records": what, "shards": num_buckets * num_shards}
            first = alternate(
                {name: seconds(lambda path=path: _join_once(path)) for name, path in sets.items()},
                num_rounds,
            )
            yield Row.of(
                "rate of the join",
                first["one"].over(first["many"]),
                "×",
                conditions={**conditions, "epoch": "first"},
                against="the same records in one shard of each bucket",
            )
            later = alternate(
                {name: seconds(_later_epochs(path, stack)) for name, path in sets.items()},
                num_rounds,
            )
            yield Row.of(
                "rate of the join",
                later["one"].over(later["many"]),
                "×",
                conditions={**conditions, "epoch": "later"},
                target=RATE_TARGET,
                against="the same records in one shard of each bucket",
            )


def _write(
    root: Path,
    num_buckets: int,
    num_shards: int,
    records_per_shard: int,
    side_px: int,
    hidden_size: int,
) -> list[Path]:
    sets = write_sets(
        root,
        num_records=num_buckets * num_shards * RECORDS_PER_SHARD,
        num_teachers=NUM_TEACHERS,
        layout="compact",
        side_px=side_px,
        records_per_shard=records_per_shard,
        num_buckets=num_buckets,
        hidden_size=hidden_size,
    )
    return list(sets.teachers)


def _stream(paths: list[Path]) -> JoinedStream:
    return JoinedStream([open_shard_set(path) for path in paths], global_batch=BATCH, num_threads=0)


def _join_once(paths: list[Path]) -> None:
    with _stream(paths) as stream:
        for _ in stream.epoch(0):
            pass


def _later_epochs(paths: list[Path], stack: ExitStack) -> Callable[[], None]:
    stream, epochs = stack.enter_context(_stream(paths)), count()

    def join() -> None:
        for _ in stream.epoch(next(epochs)):
            pass

    return join


if __name__ == "__main__":
    run_alone(measure)
