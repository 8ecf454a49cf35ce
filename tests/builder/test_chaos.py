"""Workers killed, stopped and woken at random, with payloads that no two of them share.

After every blow all that is visible must be right; when one worker runs on, the set must be
complete and clean. docs/architecture.md numbers the invariants.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from support.forked_command import FORK_SERVER
from support.patience import PATIENCE_SECONDS
from support.toy_set import ToyContent, build, planned, toy_record, work

from sdxl_distill.builder.commit import shard_header
from sdxl_distill.builder.withdrawal import withdraw_set
from sdxl_distill.errors import StorageError
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.shards.tar_index import index_of_tar
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

NUM_SHARDS = 3
NUM_WORKERS = 4
NUM_BLOWS = 30
SECONDS = 45.0
MIN_TRIALS = 2
OPTIONS = ("--random", "--slow-disk", "0.1", "--shards", str(NUM_SHARDS), "--expiry", "0.1")


class Trial:
    """Some workers on one set, and what was seen of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "toy"
        self.log = folder / "log"
        self.random = random.Random(seed)
        self.workers: list[ForkServerProcess] = []
        self.seen: dict[str, str] = {}
        self.num_withdrawals = 0
        self.num_kills = 0

    def start(self) -> None:
        rank = self.random.randrange(NUM_WORKERS)
        links = self.random.choice([(), ("--no-links",)])  # both ways exclude each other's names
        command = [str(self.path), str(rank), str(NUM_WORKERS), *OPTIONS, *links]
        worker = FORK_SERVER.Process(target=work, args=(command, str(self.log)), daemon=True)
        worker.start()
        self.workers.append(worker)

    def living(self) -> list[ForkServerProcess]:
        return [worker for worker in self.workers if worker.is_alive()]

    def strike(self) -> None:
        """Do one thing that may happen to a cluster."""
        if len(self.living()) < NUM_WORKERS:
            self.start()
        victim = self.random.choice(self.living() or [None])
        blow = self.random.choices(
            ["kill", "stop", "wake", "shift clocks", "withdraw", "forget"], [2, 6, 5, 1, 0.2, 0.5]
        )[0]
        if blow == "shift clocks":
            self._shift_time_stamps()
        elif blow == "forget":
            shutil.rmtree(self.path / ".build", ignore_errors=True)
        elif blow == "withdraw":
            if self.path.is_dir():
                withdraw_set(Location(self.path))
                self.seen.clear()
                self.num_withdrawals += 1
        elif victim is not None:
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "wake": signal.SIGCONT}[blow]
            _send(victim, number)
            self.num_kills += blow == "kill"

    def check(self) -> None:
        """Look at everything that a reader could see now (I1, I2, I3)."""
        if not self.path.is_dir():
            return
        with Directory(self.path) as directory:
            for shard in planned(NUM_SHARDS):
                idx = _read(directory, shard.name.idx)
                try:
                    tar = directory.open(shard.name.tar)
                except FileNotFoundError:
                    assert idx is None, f"I3: {shard.name} has an index without tar"
                    assert str(shard.name) not in self.seen, f"I1: {shard.name} vanished"
                    continue
                index = index_of_tar(tar, shard.name, shard_header(toy_record(), shard))
                assert idx in (None, index.to_bytes()), f"I2: {shard.name} mixes tar and index"
                seen = self.seen.setdefault(str(shard.name), index.digest)
                assert seen == index.digest, f"I1: {shard.name} changed"

    def end(self) -> None:
        """Let all that live run on, then one more worker, and look at the result (I4, I5, I8)."""
        for worker in self.living():
            _send(worker, signal.SIGCONT)
        for worker in self.workers:
            worker.join(PATIENCE_SECONDS)
            assert worker.exitcode in self._allowed_exit_codes(), self.log.read_text()
        built = build(self.path, NUM_SHARDS, ToyContent(random=True))
        self.check()
        content = (self.path / "manifest.json").read_bytes()
        with open_shard_set(self.path) as shard_set:
            indices = [shard_set.reader(name).index for name in shard_set.manifest.names()]
        assert len(indices) == NUM_SHARDS
        assert Manifest.build(built.manifest.identity, 0, indices).to_bytes() == content
        left = [
            place
            for place in self.path.rglob("*")
            if place.is_file() and (".build" in place.parts or place.name.startswith(".tmp-"))
        ]
        assert left == []
        assert {place.name for place in self.path.parent.iterdir()} <= {"toy", "log"}

    def _allowed_exit_codes(self) -> set[int]:
        withdrawn = {StorageError.exit_code} if self.num_withdrawals else set[int]()
        return {0, -signal.SIGKILL} | withdrawn

    def _shift_time_stamps(self) -> None:
        moment = time.time() + self.random.choice([-86_400, 86_400])
        for place in (self.path / ".build").rglob("*"):
            try:
                os.utime(place, (moment, moment))
            except FileNotFoundError:
                continue


def _send(worker: ForkServerProcess, number: signal.Signals) -> None:
    assert worker.pid is not None
    with suppress(ProcessLookupError):  # it ended a moment ago
        os.kill(worker.pid, number)


def _read(directory: Directory, name: str) -> bytes | None:
    try:
        return directory.read(name, 1 << 20)
    except FileNotFoundError:
        return None


def _trials(tmp_path: Path) -> Iterator[Trial]:
    """Yield trials for so long, and at least so many: a busy machine makes few."""
    deadline = time.monotonic() + SECONDS
    first_seed = random.SystemRandom().randrange(1 << 30)
    for seed in count(first_seed):
        if time.monotonic() > deadline and seed >= first_seed + MIN_TRIALS:
            return
        print(f"seed {seed}")
        folder = tmp_path / str(seed)
        folder.mkdir()
        yield Trial(folder, seed)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_no_blow_at_any_moment_mixes_loses_or_leaves_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fork server knows no other way to find what it is to load once for all workers.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    num_trials = num_kills = 0
    for trial in _trials(tmp_path):
        for _ in range(NUM_BLOWS):
            trial.strike()
            time.sleep(trial.random.uniform(0, 0.05))
            trial.check()
        trial.end()
        num_trials += 1
        num_kills += trial.num_kills
    print(f"{num_trials} trials, {num_kills} kills")
    assert num_trials >= MIN_TRIALS
    assert num_kills >= 5
