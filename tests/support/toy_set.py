"""A set of tiny random tensors, and a worker process that builds it.

Run as a script it is one worker: `toy_set.py FOLDER RANK SIZE [--seed N] [--random] [--slow S]`.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

from sdxl_distill.builder.heartbeat import Timing
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.set_builder import BuiltSet, EncodedRecord, build_set
from sdxl_distill.errors import DistillError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import RecordHeader, latents_schema
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location
from sdxl_distill.storage.staged_file import StagedFile

BATCH_SIZE = 3
NUM_RECORDS = 7
FAST = Timing(heartbeat_seconds=0.1, expiry_seconds=0.8, straggler_factor=3, poll_seconds=0.02)


class ToyContent:
    """Content of the toy set: latents that follow from key and seed, unless `random`."""

    def __init__(self, seed: int = 0, *, random: bool = False, pause_seconds: float = 0.0) -> None:
        self.seed = seed
        self.random = random
        self.pause_seconds = pause_seconds
        self.num_batches = 0

    def accepts(self, index: ShardIndex) -> bool:
        return index.keys() == keys_of(index.name)

    def read(self, shard: PlannedShard) -> Iterator[tuple[ShardName, list[str]]]:
        keys = keys_of(shard.name)
        for start in range(0, len(keys), BATCH_SIZE):
            yield shard.name, keys[start : start + BATCH_SIZE]

    def compute(
        self, batch: tuple[ShardName, list[str]]
    ) -> tuple[ShardName, list[str], list[np.ndarray]]:
        name, keys = batch
        self.num_batches += 1
        time.sleep(self.pause_seconds)
        return name, keys, [self._latents(name, key) for key in keys]

    def encode(
        self, result: tuple[ShardName, list[str], list[np.ndarray]], header: RecordHeader
    ) -> Iterator[EncodedRecord]:
        name, keys, latents = result
        sizes = np.array([name.height, name.width, 0, 0, name.height, name.width], np.int32)
        for key, values in zip(keys, latents, strict=True):
            record = header.encode({"latents": values, "time_ids": sizes})
            yield EncodedRecord(key, record, b'{"captions":[]}')

    def _latents(self, name: ShardName, key: str) -> np.ndarray:
        text = secrets.token_hex(8) if self.random else f"{self.seed} {key}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        shape = (1, name.height // 8, name.width // 8)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def keys_of(name: ShardName, num_records: int = NUM_RECORDS) -> list[str]:
    ids = (hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:32] for i in range(num_records))
    return [name.key(image_id) for image_id in sorted(ids)]


def planned(num_shards: int) -> list[PlannedShard]:
    return [PlannedShard(ShardName("toy", 64, 128, i), NUM_RECORDS) for i in range(num_shards)]


def toy_record(seed: int = 0) -> SetIdentity:
    return SetIdentity("latents", "toy", latents_schema(1), {"seed": seed})


def describe(_: Directory, identity: SetIdentity, indices: Iterable[ShardIndex]) -> Manifest:
    return Manifest.build(identity, 0, indices)


def build(
    path: Path,
    num_shards: int = 5,
    content: ToyContent | None = None,
    world: World | None = None,
    timing: Timing = FAST,
    *,
    exclusive: bool = False,
) -> BuiltSet:
    made = content or ToyContent()
    return build_set(
        Location(path),
        toy_record(made.seed),
        planned(num_shards),
        lambda: made,
        describe,
        world or World(),
        exclusive=exclusive,
        timing=timing,
    )


def slow_down_publication(seconds: float) -> None:
    """Pause at random around each publication in this process: moments to be killed in."""
    publish = Directory.publish

    def slow_publish(directory: Directory, staged: StagedFile, name: str) -> bool:
        time.sleep(secrets.randbelow(1000) / 1000 * seconds)
        made = publish(directory, staged, name)
        time.sleep(secrets.randbelow(1000) / 1000 * seconds)
        return made

    Directory.publish = slow_publish


def answer_as_vfat(*_arguments: object, **_options: object) -> None:
    """Refuse a hard link; `places.refuse_links` is out of a script's reach."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def worker_command(path: Path, rank: int = 0, size: int = 1, *options: str) -> list[str]:
    return [sys.executable, __file__, str(path), str(rank), str(size), *options]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--slow-disk", type=float, default=0.0)
    parser.add_argument("--expiry", type=float, default=FAST.expiry_seconds)
    parser.add_argument("--no-links", action="store_true")
    parser.add_argument("--straggler-factor", type=float, default=FAST.straggler_factor)
    options = parser.parse_args(arguments)
    if options.no_links:
        os.link = answer_as_vfat
    if options.slow_disk:
        slow_down_publication(options.slow_disk)
    content = ToyContent(options.seed, random=options.random, pause_seconds=options.slow)
    timing = Timing(options.expiry / 5, options.expiry, options.straggler_factor, 0.02)
    world = World(options.rank, options.size, options.rank, options.size)
    try:
        manifest, summary = build(options.path, options.shards, content, world, timing)
    except DistillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(manifest.digest, summary)
    return 0


def work(arguments: Sequence[str], log: str) -> None:
    """Be one worker; the body of a process."""
    with Path(log).open("a") as out, redirect_stdout(out), redirect_stderr(out):
        code = main(arguments)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
