"""A heartbeat names one process for ever and counts what it finished."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.patience import wait_until

from sdxl_distill.builder.heartbeat import (
    HEARTBEAT_BYTES,
    Beat,
    Heartbeat,
    Observer,
    Timing,
)
from sdxl_distill.runtime.process_identity import ProcessIdentity
from sdxl_distill.storage.fsio import Directory

HERE = ProcessIdentity.current()


def test_heartbeats_have_one_length_so_that_a_rewrite_leaves_no_rest() -> None:
    beats = [Beat(HERE, count, count) for count in (0, 10**15)]
    assert {len(beat.to_bytes()) for beat in beats} == {HEARTBEAT_BYTES}
    assert [Beat.from_bytes(beat.to_bytes()) for beat in beats] == beats


def test_this_process_is_not_gone() -> None:
    assert not HERE.is_gone(HERE)


def test_a_process_that_proc_hides_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_arguments: object, **_options: object) -> str:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "read_text", hidden)
    assert not HERE.is_gone(HERE)


def test_a_pid_that_was_given_away_again_is_another_process() -> None:
    assert replace(HERE, start_ticks=HERE.start_ticks - 1).is_gone(HERE)


def test_a_process_that_ended_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert replace(HERE, pid=process.pid).is_gone(HERE)


def test_nobody_sees_processes_of_another_host_or_container() -> None:
    ended = replace(HERE, start_ticks=HERE.start_ticks - 1)
    assert not replace(ended, boot_id="another").is_gone(HERE)
    assert not replace(ended, pid_namespace="another").is_gone(HERE)


def test_pending_records_of_the_living_are_added_up(tmp_path: Path) -> None:
    timing = Timing(heartbeat_seconds=0.01)
    with Directory(tmp_path) as first, Directory(tmp_path) as second:
        with Heartbeat(first, timing) as heartbeat:
            heartbeat.finish_records(5)
            heartbeat.finish_records(4)
            heartbeat.settle_records(5)
            observer = Observer(second, timing)
            wait_until(lambda: observer.num_pending() == 4)
        assert observer.num_pending() == 0
        assert observer.is_dead(first.token)
