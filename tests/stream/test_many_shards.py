"""Joins of more shards and teachers than a process may have open: same batches, bounded use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.shard_sets import ShardSets

from sdxl_distill.order.stream_order import ShardTable, StreamOrder
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.loader import JoinedStream

SIZES = {(64, 64 + 8 * bucket, number): 2 for bucket in range(3) for number in range(8)}
NUM_TEACHERS = 8

JOIN = """
import hashlib, os, resource, sys
limit = int(sys.argv[1])
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
digest, most = hashlib.sha256(), 0
with JoinedStream([open_shard_set(path) for path in sys.argv[2:]], global_batch=4) as stream:
    for epoch in range(2):
        for batch in stream.epoch(epoch):
            most = max(most, len(os.listdir("/proc/self/fd")))
            digest.update("".join(batch.keys).encode())
            for tensor in (batch.latents, batch.noise, batch.encoder_hidden_states,
                           *batch.predictions):
                digest.update(tensor.contiguous().numpy().tobytes())
print(digest.hexdigest(), most)
"""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    sets = ShardSets(tmp_path_factory.mktemp("many"), SIZES)
    sets.latents()
    sets.text()
    return [sets.teacher(f"teacher_{number}", "compact") for number in range(NUM_TEACHERS)]


def joined(limit: int, teachers: list[Path]) -> tuple[str, int]:
    words = [sys.executable, "-c", JOIN, str(limit), *map(str, teachers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    digest, most = done.stdout.split()
    return digest, int(most)


def test_eight_teachers_are_joined_within_the_descriptors_of_a_process(
    teachers: list[Path],
) -> None:
    digest, most = joined(4096, teachers)
    assert most > len(SIZES) * NUM_TEACHERS  # all shards of all sets
    scarce_digest, scarce = joined(100, teachers)
    assert scarce < 100
    assert scarce_digest == digest


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_reads_from_no_more_shards_at_once_than_said(world: int) -> None:
    table = ShardTable.from_rows(
        (64, height, number, 0, 4) for height in (64, 128) for number in range(100)
    )
    schedule = StreamOrder(table, seed=3, global_batch=4, window=32, lanes=4)
    in_use = schedule.num_shards_in_use(world)
    assert in_use == 2 * 4 // world * 4  # two buckets, lanes of two shards and the ends of two
    for epoch in range(3):
        stop = schedule.steps(epoch)
        reads = list(schedule.batches(epoch, 0, stop, rank=world - 1, world=world))
        for bucket in range(2):
            rows = [read.shards for read in reads if read.bucket == bucket]
            # A window lasts for 8 batches, and any 8 batches in a row lie in at most two windows.
            for start in range(len(rows) - 8):
                assert len(np.unique(rows[start : start + 8])) <= in_use


def indices_read(
    teachers: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    num_epochs: int,
    global_batch: int = 4,
) -> int:
    read: list[object] = []
    load = ShardSet._load_index

    def counted(self: ShardSet, name: object) -> object:
        read.append(name)
        return load(self, name)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardSet, "_load_index", counted)
    sets = [open_shard_set(path) for path in teachers]
    with JoinedStream(sets, global_batch=global_batch, num_threads=0) as stream:
        for epoch in range(num_epochs):
            for batch in stream.epoch(epoch):
                assert len(batch) == global_batch
    return len(read)


def test_each_index_is_read_once_however_many_epochs(
    teachers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_sets = NUM_TEACHERS + 2
    assert indices_read(teachers, monkeypatch, 3) == len(SIZES) * num_sets


def test_each_index_is_read_once_where_a_batch_takes_several_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ShardSets(tmp_path, {(64, 64, 0): 2, (64, 128, 0): 3})
    sets.latents()
    teacher = sets.teacher("teacher", draws=4)
    num_shards_of_draws = 2 * 4
    # Text and questions are the teacher's own; the latents' index is read with that of each draw.
    assert indices_read([teacher], monkeypatch, 40, global_batch=16) == 2 * num_shards_of_draws


def test_batches_are_those_of_a_join_that_keeps_one_shard(
    teachers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        state = hashlib.sha256()
        with JoinedStream([open_shard_set(path) for path in teachers], global_batch=4) as stream:
            for batch in stream.epoch(0):
                state.update(batch.latents.numpy().tobytes())
                for prediction in batch.predictions:
                    state.update(prediction.numpy().tobytes())
        return state.hexdigest()

    expected = digest()
    monkeypatch.setattr("sdxl_distill.stream.open_shard.MOST_BYTES", 1)
    assert digest() == expected
