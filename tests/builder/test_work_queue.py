"""Claims are shared, survive nothing of their owner, and never stay with the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.patience import wait_until
from support.queue_worker import UNITS, Clock, claims, commit, worker

from sdxl_distill.builder.heartbeat import HEARTBEAT_BYTES, Beat, Timing
from sdxl_distill.builder.work_queue import Claim, WorkQueue
from sdxl_distill.errors import StorageError
from sdxl_distill.runtime.world import World
from sdxl_distill.storage.fsio import Directory, new_token

CHILD = """
import sys, time
from sdxl_distill.builder.work_queue import WorkQueue
from sdxl_distill.storage.fsio import Directory
with Directory(sys.argv[1]) as directory, WorkQueue(directory) as queue:
    directory.stage()
    print(queue.claim(sys.argv[2]).name, directory.token, flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process(path: Path, unit: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", CHILD, str(path), unit]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            name, token = process.stdout.readline().split()
            assert name == f"{unit}.0"
            yield process, token
        finally:
            process.kill()


def claim_when_free(queue: WorkQueue) -> Claim:
    made: list[Claim | None] = [None]

    def try_once() -> bool:
        made[0] = queue.claim(UNITS[0])
        return made[0] is not None

    wait_until(try_once)
    assert made[0] is not None
    return made[0]


def num_records_in(heartbeat: Path) -> int:
    beat = Beat.from_bytes(heartbeat.read_bytes())
    return -1 if beat is None else beat.num_records


def drain(directory: Directory, queue: WorkQueue, world: World | None = None) -> list[Claim]:
    taken: list[Claim] = []
    for claim in queue.claim_units(UNITS, world or World()):
        taken.append(claim)
        commit(directory, claim.unit)
        queue.release(claim, committed=True)
    return taken


def test_one_worker_claims_every_unit_once_in_order(tmp_path: Path) -> None:
    with worker(tmp_path) as (directory, queue):
        assert drain(directory, queue) == [Claim(unit) for unit in UNITS]


def test_committed_units_are_not_claimed_again(tmp_path: Path) -> None:
    with worker(tmp_path) as (directory, queue):
        commit(directory, UNITS[2])
        assert [claim.unit for claim in drain(directory, queue)] == UNITS[:2] + UNITS[3:]


def test_a_rank_starts_with_its_own_stride(tmp_path: Path) -> None:
    with worker(tmp_path) as (directory, queue):
        taken = drain(directory, queue, World(1, 2, 1, 2))
    assert [claim.unit for claim in taken[:3]] == UNITS[1::2]
    assert {claim.unit for claim in taken} == set(UNITS)


def test_two_workers_share_the_units_without_doing_one_twice(tmp_path: Path) -> None:
    taken: list[list[Claim]] = [[], []]

    def work(rank: int) -> None:
        with worker(tmp_path) as (directory, queue):
            taken[rank] = drain(directory, queue)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.unit for claim in taken[0] + taken[1]) == UNITS


def test_a_claim_of_a_living_worker_is_respected(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, first), worker(tmp_path) as (_, second):
        assert first.claim(UNITS[0]) == Claim(UNITS[0])
        assert second.claim(UNITS[0]) is None


def test_a_released_claim_is_free_for_others(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, first), worker(tmp_path) as (_, second):
        claim = first.claim(UNITS[0])
        assert claim
        first.release(claim, committed=False)
        assert second.claim(UNITS[0]) == Claim(UNITS[0])


def test_what_was_committed_between_look_and_claim_is_given_back(tmp_path: Path) -> None:
    with worker(tmp_path) as (directory, queue), worker(tmp_path) as (_, other):
        walk = queue.claim_units(UNITS[:2], World())
        assert next(walk).unit == UNITS[0]
        claim = other.claim(UNITS[1])
        assert claim
        commit(directory, UNITS[1])
        other.release(claim, committed=True)
        commit(directory, UNITS[0])
        assert list(walk) == []


@pytest.mark.multiprocess
def test_a_killed_worker_of_this_host_is_dead_at_once(tmp_path: Path) -> None:
    with other_process(tmp_path, UNITS[0]) as (process, _), worker(tmp_path) as (_, queue):
        assert queue.claim(UNITS[0]) is None
        process.kill()
        process.wait()
        assert queue.claim(UNITS[0]) == Claim(UNITS[0], attempt=1)


@pytest.mark.multiprocess
def test_a_killed_worker_that_nobody_waited_for_is_dead_too(tmp_path: Path) -> None:
    with other_process(tmp_path, UNITS[0]) as (process, _), worker(tmp_path) as (_, queue):
        os.kill(process.pid, signal.SIGKILL)
        assert claim_when_free(queue) == Claim(UNITS[0], attempt=1)


@pytest.mark.multiprocess
def test_a_stopped_worker_is_dead_after_the_expiry_and_not_before(tmp_path: Path) -> None:
    clock = Clock()
    with other_process(tmp_path, UNITS[0]) as (process, _), worker(tmp_path, clock) as (_, queue):
        process.send_signal(signal.SIGSTOP)
        assert queue.claim(UNITS[0]) is None
        for _ in range(7):
            clock.seconds += 15
            assert queue.claim(UNITS[0]) is None
        clock.seconds += 15
        assert queue.claim(UNITS[0]) == Claim(UNITS[0], attempt=1)


def test_an_observer_that_slept_itself_does_not_take_others_for_dead(tmp_path: Path) -> None:
    clock = Clock()
    with worker(tmp_path) as (_, first), worker(tmp_path, clock) as (_, second):
        assert first.claim(UNITS[0])
        assert second.claim(UNITS[0]) is None
        clock.seconds += 100_000
        assert second.claim(UNITS[0]) is None


def test_a_worker_that_hangs_expires_although_its_heartbeat_thread_lives(tmp_path: Path) -> None:
    timing = Timing(heartbeat_seconds=0.02, expiry_seconds=0.2)
    with worker(tmp_path, None, timing) as (_, hung), worker(tmp_path, None, timing) as (_, queue):
        assert hung.claim(UNITS[0])
        assert claim_when_free(queue) == Claim(UNITS[0], attempt=1)


def test_a_worker_that_finishes_records_does_not_expire(tmp_path: Path) -> None:
    clock, timing = Clock(), Timing(heartbeat_seconds=0.001, expiry_seconds=0.01)
    with (
        worker(tmp_path, None, timing) as (busy_directory, busy),
        worker(tmp_path, clock, timing) as (_, queue),
    ):
        assert busy.claim(UNITS[0])
        heartbeat = tmp_path / ".build" / "workers" / busy_directory.token
        for count in range(1, 20):
            busy.heartbeat.finish_records(1)
            wait_until(lambda count=count: num_records_in(heartbeat) >= count)
            clock.seconds += 0.002
            assert queue.claim(UNITS[0]) is None


def test_time_stamps_of_files_change_nothing(tmp_path: Path) -> None:
    clock = Clock()
    with worker(tmp_path) as (_, first), worker(tmp_path, clock) as (_, second):
        assert first.claim(UNITS[0])
        for days in (-1, 1):
            moment = time.time() + days * 86_400
            for place in (tmp_path / ".build").rglob("*"):
                os.utime(place, (moment, moment))
            clock.seconds += 15
            assert second.claim(UNITS[0]) is None


@pytest.mark.parametrize(
    "content", [b"", b"../../etc", b"\xff" * 32, b"G" * 32, b"0" * 31, b"0" * 33, b"0" * 10_000]
)
def test_a_claim_that_holds_no_token_belongs_to_nobody(tmp_path: Path, content: bytes) -> None:
    with worker(tmp_path) as (_, queue):
        (tmp_path / ".build" / "claims" / f"{UNITS[0]}.4").write_bytes(content)
        assert queue.claim(UNITS[0]) == Claim(UNITS[0], attempt=5)


def test_a_fifo_in_place_of_a_claim_does_not_hang(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, queue):
        os.mkfifo(tmp_path / ".build" / "claims" / f"{UNITS[0]}.0")
        assert queue.claim(UNITS[0]) == Claim(UNITS[0], attempt=1)


def test_a_claim_of_a_worker_that_left_is_free_at_once(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, queue):
        (tmp_path / ".build" / "claims" / f"{UNITS[0]}.0").write_text(new_token())
        assert queue.claim(UNITS[0]) == Claim(UNITS[0], attempt=1)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"identity": 3}', b"9" * 5000, b"[" * HEARTBEAT_BYTES]
)
def test_a_heartbeat_with_foreign_content_is_watched_until_it_expires(
    tmp_path: Path, content: bytes
) -> None:
    clock = Clock()
    with worker(tmp_path, clock) as (_, queue):
        token = new_token()
        (tmp_path / ".build" / "claims" / f"{UNITS[0]}.0").write_text(token)
        (tmp_path / ".build" / "workers" / token).write_bytes(content)
        for _ in range(8):
            assert queue.claim(UNITS[0]) is None
            clock.seconds += 15
        assert queue.claim(UNITS[0]) == Claim(UNITS[0], attempt=1)


def test_names_that_are_no_claims_are_ignored(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, queue):
        for name in ("x", ".5", f"{UNITS[0]}.-1", f"{UNITS[0]}.9999999999", f"{UNITS[0]}.x"):
            (tmp_path / ".build" / "claims" / name).write_bytes(b"")
        assert queue.claim(UNITS[0]) == Claim(UNITS[0])


def test_idle_workers_take_over_what_is_held_for_three_medians(tmp_path: Path) -> None:
    clock = Clock()
    with worker(tmp_path, clock) as (directory, queue), worker(tmp_path) as (_, slow):
        assert slow.claim(UNITS[5])
        walk = queue.claim_units(UNITS, World())
        for unit in UNITS[:5]:
            claim = next(walk)
            assert claim == Claim(unit)
            clock.seconds += 10
            commit(directory, unit)
            queue.release(claim, committed=True)
        threading.Timer(0.1, lambda: setattr(clock, "seconds", clock.seconds + 31)).start()
        started = clock.seconds
        assert next(walk) == Claim(UNITS[5], attempt=1)
        assert clock.seconds > started


def test_a_straggler_is_left_alone_while_there_is_other_work(tmp_path: Path) -> None:
    clock = Clock()
    with worker(tmp_path, clock) as (directory, queue), worker(tmp_path) as (_, slow):
        assert slow.claim(UNITS[0])
        walk = queue.claim_units(UNITS, World())
        for expected in UNITS[1:]:
            claim = next(walk)
            assert claim == Claim(expected)
            clock.seconds += 20
            commit(directory, claim.unit)
            queue.release(claim, committed=True)


def test_waiting_ends_when_the_others_commit(tmp_path: Path) -> None:
    with worker(tmp_path) as (directory, queue), worker(tmp_path) as (_, other):
        claim = other.claim(UNITS[0])
        assert claim
        threading.Timer(0.1, lambda: commit(directory, UNITS[0])).start()
        assert list(queue.claim_units(UNITS[:1], World())) == []


def test_waiting_ends_when_stopped(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, queue), worker(tmp_path) as (_, other):
        assert other.claim(UNITS[0])
        stop = threading.Event()
        threading.Timer(0.1, stop.set).start()
        assert list(queue.claim_units(UNITS[:1], World(), stop.is_set)) == []


def test_a_worker_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, queue):
        assert queue.claim(UNITS[0])
        assert queue.claim(UNITS[1])
    assert not claims(tmp_path)
    assert not list((tmp_path / ".build" / "workers").iterdir())
    assert {place.name for place in tmp_path.iterdir()} == {".build"}


@pytest.mark.multiprocess
def test_the_sweep_removes_what_is_of_the_dead_and_nothing_of_the_living(tmp_path: Path) -> None:
    with (
        other_process(tmp_path, UNITS[0]) as (killed, dead),
        other_process(tmp_path, UNITS[1]) as (_, living),
        worker(tmp_path) as (directory, queue),
    ):
        killed.kill()
        killed.wait()
        with directory.stage() as staged:
            assert queue.claim(UNITS[2])
            queue.sweep()
            left = {place.name for place in tmp_path.rglob("*") if place.is_file()}
    own = directory.token
    assert not any(dead in name for name in left)
    assert {f"{UNITS[1]}.0", f"{UNITS[2]}.0", living, own, staged.temporary_name} <= left
    assert any(name.startswith(f".tmp-{living}-") for name in left)
    assert f"{UNITS[0]}.0" not in left


@pytest.mark.multiprocess
def test_sweeping_temporaries_keeps_claims_and_heartbeats_of_the_dead(tmp_path: Path) -> None:
    with other_process(tmp_path, UNITS[0]) as (killed, dead), worker(tmp_path) as (_, queue):
        killed.kill()
        killed.wait()
        queue.sweep_temporaries()
        left = {place.name for place in tmp_path.rglob("*") if place.is_file()}
        assert {f"{UNITS[0]}.0", dead} <= left
        assert not any(name.startswith(f".tmp-{dead}-") for name in left)


def test_a_swept_worker_shows_life_again(tmp_path: Path) -> None:
    timing = Timing(heartbeat_seconds=0.01)
    with worker(tmp_path, None, timing) as (directory, queue):
        heartbeat = tmp_path / ".build" / "workers" / directory.token
        heartbeat.unlink()
        queue.heartbeat.finish_records(3)
        wait_until(heartbeat.exists)
        wait_until(lambda: num_records_in(heartbeat) == 3)
        beat = Beat.from_bytes(heartbeat.read_bytes())
    assert beat is not None
    assert (beat.num_records, beat.num_pending) == (3, 3)


def test_a_file_in_place_of_the_build_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / ".build").write_bytes(b"")
    with (
        Directory(tmp_path) as directory,
        pytest.raises(StorageError, match=r"\.build"),
        WorkQueue(directory),
    ):
        pass


def test_a_worker_whose_set_was_withdrawn_stops_instead_of_building_for_nobody(
    tmp_path: Path,
) -> None:
    with worker(tmp_path / "set") as (_, queue):
        walk = queue.claim_units(UNITS, World())
        next(walk)
        (tmp_path / "set").rename(tmp_path / "aside")
        with pytest.raises(StorageError, match="withdrawn or moved"):
            next(walk)
