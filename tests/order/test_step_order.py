from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sdxl_distill.order.permutation import Purpose, derive
from sdxl_distill.order.step_order import StepOrder

SEED = 5


def step_order(num_records: list[int], global_batch: int = 1) -> StepOrder:
    codes = np.arange(100, 100 + len(num_records), dtype=np.uint64)
    return StepOrder(np.array(num_records), codes, seed=SEED, global_batch=global_batch)


def epoch_by_lists(num_records: list[int], global_batch: int, epoch: int) -> list[tuple[int, int]]:
    """Return (bucket, turn) of all steps of an epoch, from whole lists of turns per bucket."""
    turns = [
        list(range(epoch * n // global_batch, (epoch + 1) * n // global_batch)) for n in num_records
    ]
    num_blocks = max(1, sum(map(len, turns)) // 4096)
    phases = [
        int(derive(SEED, Purpose.PHASE, epoch, 100 + bucket)[0]) % num_blocks
        for bucket in range(len(num_records))
    ]
    steps: list[tuple[int, int]] = []
    for block in range(num_blocks):
        pieces = [
            own[
                (block * len(own) + phase) // num_blocks : ((block + 1) * len(own) + phase)
                // num_blocks
            ]
            for own, phase in zip(turns, phases, strict=True)
        ]
        buckets = [bucket for bucket, piece in enumerate(pieces) for _ in piece]
        numbers = np.arange(len(buckets))
        hashes = derive(SEED, Purpose.BLOCK, epoch, block, numbers).tolist()
        waiting = [iter(piece) for piece in pieces]
        shuffled = [buckets[index] for index in sorted(numbers.tolist(), key=hashes.__getitem__)]
        steps += [(bucket, next(waiting[bucket])) for bucket in shuffled]
    return steps


def whole_epoch(order: StepOrder, epoch: int) -> list[tuple[int, int]]:
    bucket, turn = order.turns(epoch, 0, int(order.turns_of(epoch).sum()))
    return list(zip(bucket.tolist(), turn.tolist(), strict=True))


@settings(deadline=None)
@given(
    num_records=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    global_batch=st.integers(1, 9),
    epoch=st.integers(0, 10),
)
def test_short_epochs_are_shuffled_as_lists_would_be(
    num_records: list[int], global_batch: int, epoch: int
) -> None:
    expected = epoch_by_lists(num_records, global_batch, epoch)
    if expected:
        assert whole_epoch(step_order(num_records, global_batch), epoch) == expected


@pytest.mark.parametrize("epoch", [0, 3])
def test_long_epochs_are_shuffled_block_by_block_as_lists_would_be(epoch: int) -> None:
    num_records = [12_000, 1, 0, 3_001, 2]
    order = step_order(num_records)
    assert whole_epoch(order, epoch) == epoch_by_lists(num_records, 1, epoch)


def test_a_stretch_across_blocks_is_a_piece_of_the_epoch() -> None:
    order = step_order([12_000, 500])
    steps = whole_epoch(order, 1)
    for start, stop in ((0, 1), (3000, 9500), (12_499, 12_500), (4100, 4200)):
        bucket, turn = order.turns(1, start, stop)
        assert list(zip(bucket.tolist(), turn.tolist(), strict=True)) == steps[start:stop]


def test_blocks_hold_each_bucket_in_proportion() -> None:
    bucket, _ = step_order([40_000, 20_000, 5_000]).turns(0, 0, 65_000)
    for start in range(0, 60_000, 5000):
        shares = np.bincount(bucket[start : start + 5000], minlength=3) / 5000
        assert np.abs(shares - np.array([40, 20, 5]) / 65).max() < 0.04


def test_small_buckets_come_at_all_places_of_an_epoch() -> None:
    order = step_order([40_000, 2, 1])
    places = np.concatenate(
        [np.flatnonzero(order.turns(epoch, 0, 40_003)[0]) for epoch in range(60)]
    )
    # Uniform: mean 0.5, standard deviation 0.29.
    assert 0.45 < np.mean(places / 40_003) < 0.55
    assert 0.26 < np.std(places / 40_003) < 0.32


def test_no_turn_is_lost_or_taken_twice_between_epochs() -> None:
    order = step_order([7, 2, 30], global_batch=4)
    seen = Counter(
        step
        for epoch in range(8)
        if order.turns_of(epoch).any()
        for step in whole_epoch(order, epoch)
    )
    assert set(seen.values()) == {1}
    assert sorted(seen) == [
        (bucket, turn) for bucket, n in enumerate([7, 2, 30]) for turn in range(8 * n // 4)
    ]


@given(
    num_records=st.lists(st.integers(0, 10**9), min_size=1, max_size=40).filter(any),
    global_batch=st.integers(1, 4096),
    global_step=st.integers(0, 10**12),
)
def test_the_epoch_of_a_step_begins_before_it_and_ends_after_it(
    num_records: list[int], global_batch: int, global_step: int
) -> None:
    order = step_order(num_records, global_batch)
    global_step %= 1 + 1000 * sum(num_records) // global_batch
    epoch = order.epoch_of(global_step)
    assert order.steps_before(epoch) <= global_step < order.steps_before(epoch + 1)
