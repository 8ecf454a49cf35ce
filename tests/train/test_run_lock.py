"""One trainer at a time: who holds a run is named, who died holds nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.distill_cache import DistillCache
from support.patience import PATIENCE_SECONDS, wait_until
from support.ranks import Ranks, wait_until as wait_for_ranks

from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.runtime.process_identity import ProcessIdentity
from sdxl_distill.train.run_lock import Holder, LockTiming, RunLock

QUICK = LockTiming(beat_seconds=0.02, expiry_seconds=0.3, poll_seconds=0.01)
ELSEWHERE = Holder(ProcessIdentity("another boot", "", 77, 5), "node7", "2026-01-01T00:00:00+00:00")
SLEEPER = """
import sys, time
from pathlib import Path
from sdxl_distill.train.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_many_at_once_one_gets_it_and_afterwards_the_next(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    ended = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(_hold, tmp_path, together, ended) for _ in range(8)]
        wait_until(lambda: sum(each.done() for each in futures) == 7)
        ended.set()
    assert sorted(each.result() for each in futures) == [False] * 7 + [True]
    assert files(tmp_path) == []
    with RunLock(tmp_path) as lock:
        lock.require_held()
        assert files(tmp_path) == ["lock-000001.json"]


def _hold(path: Path, together: threading.Barrier, ended: threading.Event) -> bool:
    together.wait(PATIENCE_SECONDS)
    try:
        with RunLock(path):
            return ended.wait(PATIENCE_SECONDS)
    except ConfigError:
        return False


@pytest.mark.multiprocess
def test_a_living_holder_is_named_and_a_killed_one_is_noticed_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            ConfigError,
            match=f"process {process.pid} on host .* has been training this run since 20",
        ) as held:
            RunLock(tmp_path).__enter__()
        assert held.value.where == str(tmp_path / "lock-000001.json")
        process.kill()
        process.wait()
        # Waiting for a silent holder would outlast the test.
        with RunLock(tmp_path, LockTiming(expiry_seconds=3600, poll_seconds=3600)):
            assert files(tmp_path) == ["lock-000002.json"]


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """A holder on another host."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            path.write_bytes(replace(ELSEWHERE, num_beats=time.monotonic_ns()).to_bytes())

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_a_holder_on_another_host_is_named_as_long_as_it_shows_life(tmp_path: Path) -> None:
    path = tmp_path / "lock-000004.json"
    path.write_bytes(ELSEWHERE.to_bytes())
    with (
        beating(path),
        pytest.raises(
            ConfigError, match="process 77 on host node7 has been training this run since 2026"
        ),
    ):
        RunLock(tmp_path, QUICK).__enter__()
    with RunLock(tmp_path, QUICK):
        assert files(tmp_path) == ["lock-000005.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"identity": 3}', b"[" * 4000, b"x" * 5000])
def test_what_is_no_lock_is_nobodys_after_a_while(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock-000001.json").write_bytes(content)
    with RunLock(tmp_path, QUICK):
        assert files(tmp_path) == ["lock-000002.json"]


def test_a_holder_that_was_taken_for_dead_leaves_the_run_to_its_successor(tmp_path: Path) -> None:
    with RunLock(tmp_path, QUICK) as lock:
        time.sleep(0.1)
        lock.require_held()
        (tmp_path / "lock-000001.json").unlink()
        (tmp_path / "lock-000002.json").write_bytes(ELSEWHERE.to_bytes())
        time.sleep(0.1)
        with pytest.raises(StorageError, match="taken over this run"):
            lock.require_held()
    assert files(tmp_path) == ["lock-000002.json"]


def test_a_name_that_was_a_dead_lock_and_is_a_living_one_again_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock-000001.json"
    path.write_bytes(b"dead")
    require_dead = RunLock._require_dead

    def while_others_came_and_went(lock: RunLock, name: str) -> bytes | None:
        content = require_dead(lock, name)
        path.write_bytes(Holder.current().to_bytes())
        return content

    monkeypatch.setattr(RunLock, "_require_dead", while_others_came_and_went)
    with pytest.raises(ConfigError, match="has been training this run since"):
        RunLock(tmp_path, QUICK).__enter__()
    assert files(tmp_path) == ["lock-000001.json"]


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith("lock-")}  # fmt: skip


@pytest.mark.multiprocess
def test_a_second_train_touches_nothing_of_the_run(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config_file(tmp_path)
    endless = ("--set=training.num_steps=100000", "--set=training.validation.fraction=0")
    first = Ranks(1, config, *endless, "--set=training.checkpoint_every=100000")
    wait_for_ranks(lambda: "images/s" in first.log.read_text(), first)
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "runs" / "run" / "checkpoints" / ".tmp-being-written").touch()
    before = {path for path in contents(tmp_path) if path != first.log}
    second = Ranks(1, config, *endless, "--resume", "latest")
    assert second.wait() == [2]
    assert "has been training this run since" in second.log.read_text()
    assert {path for path in contents(tmp_path) if path != first.log} == before
    first.kill()
    third = Ranks(1, config, "--set=training.num_steps=1", "--resume", "latest")
    assert third.wait() == [0], third.log.read_text()
