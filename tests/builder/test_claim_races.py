"""What others do between a look and a claim, and whose time says what takes too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.queue_worker import UNITS, Clock, claims, commit, worker

from sdxl_distill.builder.work_queue import Claim
from sdxl_distill.runtime.world import World


def test_what_is_committed_right_after_the_look_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(tmp_path) as (directory, queue), worker(tmp_path) as (other_directory, other):
        look = directory.exists
        looks: list[bool] = []

        def look_and_sleep(name: str) -> bool:
            looks.append(look(name))
            if len(looks) == 1:  # another worker claims, commits and lets go meanwhile
                claim = other.claim(UNITS[0])
                assert claim
                commit(other_directory, UNITS[0])
                other.release(claim, committed=True)
            return looks[-1]

        monkeypatch.setattr(directory, "exists", look_and_sleep)
        assert list(queue.claim_units(UNITS[:1], World())) == []
        assert looks == [False, True]
        assert claims(tmp_path) == set()


@pytest.mark.parametrize("committed", [True, False])
def test_only_units_that_were_committed_say_how_long_one_takes(
    tmp_path: Path, committed: bool
) -> None:
    """Claims that were given back at once would make every other worker a straggler."""
    clock = Clock()
    deadline = clock.seconds + 60
    with worker(tmp_path, clock) as (_, queue), worker(tmp_path) as (_, other):
        assert other.claim(UNITS[0])
        for unit in UNITS[1:]:
            claim = queue.claim(unit)
            assert claim
            queue.release(claim, committed=committed)

        def stop_after_a_minute() -> bool:
            clock.seconds += 10
            return clock.seconds > deadline

        taken = list(queue.claim_units(UNITS[:1], World(), stop_after_a_minute))
    assert taken == ([Claim(UNITS[0], attempt=1)] if committed else [])
