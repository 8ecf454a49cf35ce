"""The moving average of the student."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sdxl_distill.errors import IncompatibleError
from sdxl_distill.optimizer.stochastic_rounding import split_master
from sdxl_distill.train.ema import (
    Ema,
    FollowedWeight,
    decay_since,
    ema_decay_at,
    even_parts,
    interval_at,
    is_followed,
)

pytestmark = pytest.mark.processors

EVERY = 8
DECAYS = [0.0, 0.9, 0.999, 0.9999]


def follow(ema: Ema, weights: dict[str, torch.Tensor], step: int) -> None:
    ema.update([FollowedWeight(name, weight) for name, weight in weights.items()], step)


def test_decay_warms_up_to_its_limit() -> None:
    assert ema_decay_at(0, 0.9999) == pytest.approx(0.1)
    assert ema_decay_at(90, 0.9999) == pytest.approx(0.91)
    assert ema_decay_at(10**7, 0.9999) == 0.9999


def test_average_follows_the_recurrence_in_float32() -> None:
    parameter = torch.zeros(4, dtype=torch.bfloat16)
    ema = Ema([("weight", parameter)], 0.9)
    expected = torch.zeros(4, dtype=torch.float64)
    for step in range(50):
        parameter.fill_(step * 0.125)
        follow(ema, {"weight": parameter}, step)
        decay = ema_decay_at(step, 0.9)
        expected = decay * expected + (1 - decay) * parameter.double()
    assert ema.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_interval_grows_with_the_decay_and_bounds_each_move(decay: float) -> None:
    intervals = [interval_at(step, decay, EVERY) for step in range(3000)]
    assert intervals[0] == 1
    assert all(earlier <= later for earlier, later in pairwise(intervals))
    assert intervals[-1] == (EVERY if decay > 0.99 else 1)
    for phase in range(EVERY):
        for step in range(3000):
            if interval_at(step, decay, EVERY) > 1:
                # One interval may be longer where it grows.
                assert decay_since(step, phase, decay, EVERY) > 0.75


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("phase", range(0, EVERY, 3))
def test_decays_since_the_last_time_leave_none_out_and_count_none_twice(
    decay: float, phase: int
) -> None:
    product = expected = 1.0
    followed = -1
    for step in range(2000):
        expected *= ema_decay_at(step, decay)
        if is_followed(step, phase, decay, EVERY):
            product *= decay_since(step, phase, decay, EVERY)
            assert product == pytest.approx(expected, rel=1e-12)
            followed = step
        assert step - followed < 2 * EVERY


def test_once_warm_every_step_follows_another_part_of_about_the_same_size() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 1000, (200,), generator=generator).tolist()
    weights = {f"{number}": torch.ones(size) for number, size in enumerate(sizes)}
    ema = Ema(weights.items(), 0.999, ema_every=EVERY)
    moved = {name: weight + 1 for name, weight in weights.items()}
    seen: set[str] = set()
    for step in range(100_000, 100_000 + EVERY):
        before = {name: average.clone() for name, average in ema.averages.items()}
        follow(ema, moved, step)
        now = {name for name, each in ema.averages.items() if not torch.equal(each, before[name])}
        assert not now & seen
        assert sum(weights[name].numel() for name in now) == pytest.approx(
            sum(sizes) / EVERY, rel=0.02
        )
        seen |= now
    assert seen == set(weights)


def test_followed_at_intervals_it_comes_to_the_same_where_weights_stand_still() -> None:
    start = {f"{number}": torch.zeros(1) for number in range(EVERY)}
    weights = {name: each + 1 for name, each in start.items()}
    ema = Ema(start.items(), 0.999, ema_every=EVERY)
    distances: dict[str, float] = {}
    expected: dict[str, float] = {}
    changed_at: dict[str, int] = {}
    for step in range(10_000, 10_500):
        follow(ema, weights, step)
        for name, average in ema.averages.items():
            distance = 1 - average.item()
            if distance != distances.get(name, 1.0):
                since = step - changed_at.get(name, step)
                expected[name] = expected.get(name, distance) * 0.999**since
                assert distance == pytest.approx(expected[name], abs=1e-4)
                distances[name], changed_at[name] = distance, step
    assert sorted(changed_at.values()) == list(range(10_500 - EVERY, 10_500))


def test_the_exact_value_of_a_rounded_weight_is_followed() -> None:
    master = torch.linspace(1, 1.001, 300_000).view(3, -1)
    weight, remainder = split_master(master)
    ema = Ema([("weight", torch.zeros_like(weight))], 0.0)
    ema.update([FollowedWeight("weight", weight, remainder)], 0)
    assert torch.equal(ema.averages["weight"], master)


def test_weights_of_any_layout_are_followed() -> None:
    weight = torch.arange(2.0 * 96 * 64 * 64).view(2, 96, 64, 64)
    weight = weight.to(memory_format=torch.channels_last)
    ema = Ema([("weight", torch.zeros_like(weight)), ("scalar", torch.tensor(0.0))], 0.0)
    follow(ema, {"weight": weight, "scalar": torch.tensor(2.0)}, 0)
    assert torch.equal(ema.averages["weight"], weight)
    assert ema.averages["scalar"] == 2


def test_the_shares_of_all_ranks_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {f"{n}": torch.randn(n + 1, 7, generator=generator) for n in range(30)}
    whole = Ema(weights.items(), 0.99)
    shares = [Ema(weights.items(), 0.99, rank=rank, num_ranks=3) for rank in range(3)]
    moved = {name: weight * 2 for name, weight in weights.items()}
    for step in range(5):
        for ema in (whole, *shares):
            follow(ema, moved, step)
    together = [item for share in shares for item in share.averages.items()]
    assert sorted(name for name, _ in together) == sorted(weights)
    assert all(torch.equal(average, whole.averages[name]) for name, average in together)
    num_elements = [sum(map(torch.Tensor.numel, share.averages.values())) for share in shares]
    assert max(num_elements) < 1.02 * min(num_elements)


def test_equal_parts_do_not_depend_on_the_order() -> None:
    sizes = {"a": 3, "b": 3, "c": 2, "d": 2, "e": 2}
    parts = even_parts(sizes, 2)
    assert parts == even_parts(dict(reversed(sizes.items())), 2)
    sums = [sum(sizes[name] for name in parts if parts[name] == part) for part in range(2)]
    assert sorted(sums) == [5, 7]  # a bound of the method, not the best


def test_averages_do_not_alias_the_parameters() -> None:
    parameter = torch.zeros(2)
    ema = Ema([("weight", parameter)], 0.9)
    parameter.fill_(1)
    assert ema.averages["weight"].tolist() == [0, 0]


def test_a_share_is_loaded_from_the_whole() -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for rank in range(2):
        ema = Ema(weights.items(), 0.9, rank=rank, num_ranks=2)
        ema.load({"a": torch.ones(2), "b": torch.ones(3)})
        (average,) = ema.averages.values()
        assert torch.equal(average, torch.ones_like(average))


def test_loading_another_students_averages_is_refused() -> None:
    ema = Ema([("weight", torch.zeros(2))], 0.9)
    with pytest.raises(IncompatibleError, match="'weight'"):
        ema.load({"weight": torch.zeros(3)})
