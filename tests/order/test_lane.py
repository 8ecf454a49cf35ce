from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sdxl_distill.errors import ConfigError
from sdxl_distill.order.lane import Lanes, default_lanes
from sdxl_distill.order.permutation import Purpose, derive, permute

CODE = 2**40 + 7


def lap_on_line(lanes: Lanes, num_records: int, lap: int, world: int = 1) -> dict[int, int]:
    """Return place on the line by place of the endless line, for one whole lap."""
    places = np.arange(lap * num_records, (lap + 1) * num_records)
    found: dict[int, int] = {}
    for rank in range(world):
        positions = lanes.positions(rank, world)
        own = places[np.isin(places % lanes.num_lanes, positions % lanes.num_lanes)]
        column = own[:, np.newaxis]
        on_line = lanes.place_on_line(
            column,
            np.full_like(column, lap),
            np.full_like(column, num_records),
            np.full(column.shape, CODE, dtype=np.uint64),
            # One position per turn, of the place's own lane.
            own[:, np.newaxis] % lanes.num_lanes,
        )
        found |= dict(zip(own.tolist(), on_line[:, 0].tolist(), strict=True))
    return found


def lap_by_lists(
    num_lanes: int, window: int, seed: int, num_records: int, lap: int
) -> dict[int, int]:
    """Deal the places to lanes, cut the line into their stretches, and permute list by list."""
    places = range(lap * num_records, (lap + 1) * num_records)
    line = list(range(num_records))
    found: dict[int, int] = {}
    for lane in range(num_lanes):
        own = [place for place in places if place % num_lanes == lane]
        stretch, line = line[: len(own)], line[len(own) :]
        key = derive(seed, Purpose.LANE, CODE, lap, lane)
        mixed: list[int] = []
        for start in range(0, len(own), window):
            piece = list(range(start, min(start + window, len(own))))
            lengths = np.full(len(piece), len(piece))
            keys = np.repeat(key + np.uint64(start), len(piece))
            mixed += [piece[i] for i in permute(np.arange(len(piece)), lengths, keys)]
        if own:
            turned = int(key[0]) % len(own)
            stretch = stretch[turned:] + stretch[:turned]
        found |= {place: stretch[offset] for place, offset in zip(own, mixed, strict=True)}
    return found


@settings(max_examples=60, deadline=None)
@given(
    num_lanes=st.sampled_from([1, 2, 3, 6, 12]),
    window=st.sampled_from([1, 20, 100]),
    seed=st.integers(0, 2**64 - 1),
    num_records=st.integers(1, 150),
    lap=st.integers(0, 1000),
)
def test_places_are_dealt_cut_and_permuted_as_lists_would_be(
    num_lanes: int, window: int, seed: int, num_records: int, lap: int
) -> None:
    lanes = Lanes(num_lanes, global_batch=12, window=window, seed=seed)
    expected = lap_by_lists(num_lanes, lanes.num_mixed // num_lanes, seed, num_records, lap)
    assert lap_on_line(lanes, num_records, lap) == expected
    assert sorted(expected.values()) == list(range(num_records))


@pytest.mark.parametrize(
    ("num_lanes", "global_batch", "window", "num_mixed"),
    [
        (64, 64, 16384, 16384),
        (1, 1, 1, 1),
        (4, 12, 1, 16),
        (3, 12, 100, 192),
        (64, 64, 16385, 32768),
    ],
)
def test_a_window_per_lane_is_a_power_of_two_that_covers_batch_and_window(
    num_lanes: int, global_batch: int, window: int, num_mixed: int
) -> None:
    lanes = Lanes(num_lanes, global_batch=global_batch, window=window, seed=0)
    assert lanes.num_mixed == num_mixed


def test_a_rank_owns_neighbouring_lanes_in_the_order_of_slots() -> None:
    lanes = Lanes(6, global_batch=12, window=1, seed=0)
    assert lanes.positions(0, 1).tolist() == list(range(12))
    assert [lanes.positions(rank, 3).tolist() for rank in range(3)] == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
    ]


@pytest.mark.parametrize(
    ("num_records", "num_shards", "world", "num_in_use"),
    [
        (1000, 100, 1, 4 * 4),  # 16 records of a lane touch two shards of 10, and two at the ends
        (1000, 100, 2, 2 * 4),
        (1000, 100, 4, 4),
        (30, 30, 4, 8 + 2),  # the lane has 8 records, fewer than its window of 16
        (7, 7, 4, 2 + 2),
        (30, 30, 1, 30),  # never more than there are
        (10, 1, 2, 1),
        (0, 0, 1, 0),
    ],
)
def test_the_shards_in_use_are_those_of_one_window_per_lane_and_its_ends(
    num_records: int, num_shards: int, world: int, num_in_use: int
) -> None:
    lanes = Lanes(4, global_batch=4, window=64, seed=0)
    counts = np.array([num_records]), np.array([num_shards])
    assert lanes.num_shards_in_use(*counts, world).tolist() == [num_in_use]


def test_lanes_shorter_than_a_shard_start_elsewhere_in_each_lap() -> None:
    lanes = Lanes(4, global_batch=4, window=4, seed=0)
    first = np.array(list(lap_on_line(lanes, 4000, 0).values()))
    second = np.array(list(lap_on_line(lanes, 4000, 1).values()))
    in_lane = [np.corrcoef(first[i::4], second[i::4])[0, 1] for i in range(4)]
    assert np.mean(in_lane) < 0.6


@pytest.mark.parametrize(
    ("global_batch", "lanes"),
    [(1, 1), (48, 48), (64, 64), (65, 13), (96, 48), (1024, 64), (134, 2), (67, 1)],
)
def test_default_lanes_are_the_largest_divisor_up_to_64(global_batch: int, lanes: int) -> None:
    assert default_lanes(global_batch) == lanes


@pytest.mark.parametrize("num_lanes", [0, -2, 5, 24])
def test_lanes_that_do_not_divide_the_batch_are_refused_with_those_that_do(num_lanes: int) -> None:
    with pytest.raises(
        ConfigError, match=r"a global batch of 12; expected one of \[1, 2, 3, 4, 6, 12\]"
    ):
        Lanes(num_lanes, global_batch=12, window=1, seed=0)


@pytest.mark.parametrize("world", [0, 3, 8])
def test_a_world_that_does_not_divide_the_lanes_is_refused(world: int) -> None:
    with pytest.raises(ConfigError, match=r"processes for 4 lanes; expected one of \[1, 2, 4\]"):
        Lanes(4, global_batch=12, window=1, seed=0).positions(0, world)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of 2"):
        Lanes(4, global_batch=12, window=1, seed=0).positions(rank, 2)
