"""Real workers share a set, are killed, stopped and woken, and leave it right and clean."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.patience import PATIENCE_SECONDS, wait_until
from support.toy_set import (
    NUM_RECORDS,
    ToyContent,
    build,
    describe,
    planned,
    toy_record,
    worker_command,
)

from sdxl_distill.builder.heartbeat import Timing
from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.set_builder import build_set
from sdxl_distill.errors import CorruptError, NumericalError, Preempted, StorageError
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.storage.location import Location

LONG = ("--expiry", "600")


def start(
    path: Path, *options: str, rank: int = 0, size: int = 1, environment: Mapping[str, str] = {}
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        worker_command(path, rank, size, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    """Wait for a worker and return the counts of its summary."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, err
    return {name: int(count) for name, count in re.findall(r"(num_\w+)=(\d+)", out)}


def wait_for(path: Path, pattern: str, count: int = 1) -> None:
    wait_until(lambda: len(list(path.glob(pattern))) >= count)


def ask_to_stop_once_it_is_heard() -> None:
    """Send SIGTERM to this process some time after it no longer ends it."""

    def ask() -> None:
        wait_until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()


def leftovers(path: Path) -> list[str]:
    """Return names of temporary files, claims and heartbeats."""
    return [
        place.name
        for place in path.rglob("*")
        if place.is_file() and (".build" in place.parts or place.name.startswith(".tmp-"))
    ]


def content_of(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        place.name: (place.stat().st_ino, place.read_bytes())
        for place in path.iterdir()
        if place.is_file() and not place.name.startswith(".")
    }


def test_a_built_set_can_be_opened_and_read(tmp_path: Path) -> None:
    built = build(tmp_path / "toy", 3)
    assert (built.summary.num_built, built.summary.num_records) == (3, 3 * NUM_RECORDS)
    with open_shard_set(tmp_path / "toy") as shard_set:
        assert shard_set.manifest == built.manifest
        for name in shard_set.manifest.names():
            assert shard_set.reader(name).index.num_records == NUM_RECORDS
    assert leftovers(tmp_path) == []


def test_a_complete_set_is_left_alone_and_nothing_is_loaded(tmp_path: Path) -> None:
    build(tmp_path / "toy", 3)
    before = content_of(tmp_path / "toy")

    def load() -> ToyContent:
        raise AssertionError("loaded")

    built = build_set(Location(tmp_path / "toy"), toy_record(), planned(3), load, describe, World())
    assert (built.summary.num_present, built.summary.num_built) == (3, 0)
    assert content_of(tmp_path / "toy") == before


def test_shards_without_records_are_shards(tmp_path: Path) -> None:
    class Empty(ToyContent):
        def read(self, shard: PlannedShard) -> Iterator[tuple[ShardName, list[str]]]:
            yield from list(super().read(shard))[:0]

    built = build(tmp_path / "toy", 2, Empty())
    assert [entry.num_records for entry in built.manifest.shards] == [0, 0]


@pytest.mark.parametrize("method", ["read", "compute", "encode"])
def test_a_fault_of_the_content_surfaces_and_keeps_what_is_committed(
    tmp_path: Path, method: str
) -> None:
    class Faulty(ToyContent):
        num_calls = 0

    def fail(self: Faulty, *arguments: object) -> object:
        self.num_calls += 1
        if self.num_calls > (2 if method == "read" else 7):
            raise NumericalError("NaN", where="key k")
        return getattr(ToyContent, method)(self, *arguments)

    setattr(Faulty, method, fail)
    with pytest.raises(NumericalError, match="NaN"):
        build(tmp_path / "toy", 5, Faulty())
    assert leftovers(tmp_path) == []
    assert {p.stem for p in tmp_path.rglob("*.tar")} == {p.stem for p in tmp_path.rglob("*.idx")}
    assert build(tmp_path / "toy", 5).summary.num_built >= 3


def test_a_stop_request_drops_what_is_not_committed(tmp_path: Path) -> None:
    ask_to_stop_once_it_is_heard()
    with pytest.raises(Preempted):
        build(tmp_path / "toy", 50, ToyContent(pause_seconds=0.02))
    assert leftovers(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_stop_request_is_heard_while_waiting_for_others(tmp_path: Path) -> None:
    claims = tmp_path / "toy" / ".build" / "claims"
    workers = tmp_path / "toy" / ".build" / "workers"
    for folder in (claims, workers):
        folder.mkdir(parents=True)
    (claims / f"{planned(1)[0].name}.0").write_text("a" * 32)
    (workers / ("a" * 32)).write_text("somebody")
    ask_to_stop_once_it_is_heard()
    with pytest.raises(Preempted):
        build(tmp_path / "toy", 1, timing=Timing(poll_seconds=0.02))


@pytest.mark.parametrize("content", [b"", b"../../etc", b"\xff\xfe", b"0" * 5000])
def test_strange_claims_do_not_disturb_a_build(tmp_path: Path, content: bytes) -> None:
    claims = tmp_path / "toy" / ".build" / "claims"
    claims.mkdir(parents=True)
    for shard in planned(3):
        (claims / f"{shard.name}.0").write_bytes(content)
    (claims / "nonsense").write_bytes(content)
    assert build(tmp_path / "toy", 3).summary.num_taken_over == 3
    assert leftovers(tmp_path) == ["nonsense"]


def test_a_foreign_tar_stops_the_build_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    build(tmp_path / "other", 3, ToyContent(seed=1))
    path.mkdir()
    name = planned(3)[1].name
    content = (tmp_path / "other" / name.tar).read_bytes()
    (path / name.tar).write_bytes(content)
    with pytest.raises(CorruptError, match="--repair"):
        build(path, 3)
    assert (path / name.tar).read_bytes() == content
    assert leftovers(tmp_path) == []


def test_a_fifo_in_place_of_a_tar_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    os.mkfifo(tmp_path / "toy" / planned(1)[0].name.tar)
    with pytest.raises(CorruptError, match="--repair"):
        build(tmp_path / "toy", 1)


def test_a_worker_whose_staged_files_were_swept_builds_them_again(tmp_path: Path) -> None:
    class Swept(ToyContent):
        num_encoded = 0

        def encode(self, result, header):
            self.num_encoded += 1
            if self.num_encoded == 1:
                for place in (tmp_path / "toy").glob(".tmp-*"):
                    place.unlink()
            yield from super().encode(result, header)

    built = build(tmp_path / "toy", 3, Swept())
    assert (built.summary.num_built, built.summary.num_dropped) == (3, 1)


@pytest.mark.multiprocess
def test_two_launches_at_once_share_the_work(tmp_path: Path) -> None:
    # Who sleeps for three shards' time on a busy machine would be taken for a straggler.
    slow = ("--shards", "12", "--slow", "0.05", "--straggler-factor", "1e6", *LONG)
    summaries = [finish(worker) for worker in [start(tmp_path / "toy", *slow) for _ in range(2)]]
    assert sum(summary["num_built"] for summary in summaries) == 12
    assert sum(summary["num_duplicates"] for summary in summaries) == 0
    assert leftovers(tmp_path) == []


@pytest.mark.multiprocess
def test_a_killed_worker_costs_no_wait_when_it_is_started_again(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    worker = start(path, "--slow", "0.2", *LONG)
    wait_for(path, "*.idx", 2)
    wait_for(path, ".tmp-*")
    worker.kill()
    worker.communicate()
    assert leftovers(path)
    started = time.monotonic()
    summary = finish(start(path, *LONG))
    assert summary["num_present"] >= 2
    assert summary["num_taken_over"] >= 1
    assert time.monotonic() - started < float(LONG[1])
    assert leftovers(path) == []


@pytest.mark.multiprocess
def test_a_stopped_worker_is_replaced_and_changes_nothing_when_woken(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    zombie = start(path, "--random", "--slow", "0.1")
    wait_for(path, "*.idx")
    wait_for(path, ".tmp-*")
    zombie.send_signal(signal.SIGSTOP)
    summary = finish(start(path, "--random"))
    assert summary["num_taken_over"] >= 1
    before = content_of(path)
    zombie.send_signal(signal.SIGCONT)
    finish(zombie)
    assert content_of(path) == before
    assert leftovers(path) == []


@pytest.mark.multiprocess
def test_a_terminated_worker_leaves_with_75_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    worker = start(path, "--slow", "0.2", *LONG)
    wait_for(path, "*.idx")
    worker.terminate()
    _, err = worker.communicate(timeout=PATIENCE_SECONDS)
    assert worker.returncode == 75, err
    assert leftovers(path) == []
    assert finish(start(path, *LONG))["num_present"] >= 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("attempt", range(3))
def test_of_two_configurations_exactly_one_publishes(tmp_path: Path, attempt: int) -> None:
    path = tmp_path / f"toy{attempt}"
    workers = [start(path, "--seed", str(seed), "--shards", "3") for seed in (1, 2)]
    codes = sorted(worker.wait() for worker in workers)
    errors = "".join(worker.communicate()[1] for worker in workers)
    assert codes == [0, 4], errors
    assert "content.seed" in errors
    with open_shard_set(path) as shard_set:
        for name in shard_set.manifest.names():
            header = shard_set.reader(name).index.header
            assert header.fingerprint == shard_set.manifest.identity.fingerprint


@pytest.mark.multiprocess
def test_a_full_disk_is_typed_and_keeps_committed_work(tmp_path: Path) -> None:
    path = tmp_path / "toy"
    build(path, 2)
    command = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", *worker_command(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "run again" in done.stderr
    assert leftovers(path) == []
    assert finish(start(path))["num_present"] == 2
