"""What one rank alone concludes, and ranks that drift apart; test_resume.py has other ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support.distill_cache import DistillCache
from support.ranks import Ranks

from sdxl_distill.train.agreement import Agreement, Verdict, shared_numbers


@pytest.mark.parametrize(
    ("stop", "numbers", "verdict"),
    [
        (False, [1.0, -2.0], Verdict(stop=False, is_finite=True)),
        (True, [0.0], Verdict(stop=True, is_finite=True)),
        (False, [1.0, math.nan], Verdict(stop=False, is_finite=False)),
        (True, [-math.inf, 1.0], Verdict(stop=True, is_finite=False)),
        (False, [3.0e38, 3.0e38], Verdict(stop=False, is_finite=True)),
    ],
)
def test_the_verdict_is_what_was_asked(stop: bool, numbers: list[float], verdict: Verdict) -> None:
    agreement = Agreement(Accelerator(cpu=True))
    agreement.ask(stop, torch.tensor(numbers), torch.empty(0))
    assert agreement.answer() == verdict


def test_a_shared_number_that_is_not_finite_is_no_difference_between_ranks() -> None:
    agreement = Agreement(Accelerator(cpu=True))
    agreement.ask(False, torch.ones(2), torch.tensor([2.0, math.nan]))
    verdict = agreement.answer()
    assert not verdict.is_finite
    assert verdict.is_shared
    assert verdict.lowest[0] == verdict.highest[0] == 2.0


@pytest.mark.parametrize(
    ("high", "is_shared"), [(1.0, True), (1.00005, True), (1.0003, False), (-1.0, False)]
)
def test_only_rounding_is_no_difference(high: float, is_shared: bool) -> None:
    low, high = sorted((1.0, high))
    verdict = Verdict(stop=False, is_finite=True, lowest=(3.0, low), highest=(3.0, high))
    assert verdict.is_shared is is_shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_missed_step_shows_in_most_weights(dtype: torch.dtype) -> None:
    """Weights of σ 0.02 that all move by 5e-6: the sum moves by 2.5e-4 of the norm, rms."""
    generator = torch.Generator().manual_seed(0)
    num_found = 0
    for _ in range(40):
        weight = torch.randn(320, 320, generator=generator) * 0.02
        moved = weight + 5e-6 * torch.randn(weight.shape, generator=generator).sign()
        pair = [shared_numbers(torch.tensor(1.0), each.to(dtype)) for each in (weight, moved)]
        low, high = torch.stack(pair).aminmax(dim=0)
        verdict = Verdict(False, True, tuple(low.tolist()), tuple(high.tolist()))
        num_found += not verdict.is_shared
    # 69 % of a normal distribution is beyond 0.4 σ: 28 of 40, less three σ of that count.
    assert num_found >= 19


def test_a_difference_of_small_norms_counts_as_one_of_large() -> None:
    numbers = [shared_numbers(torch.tensor(norm), torch.ones(3)) for norm in (1e-6, 1.001e-6)]
    assert (numbers[1] - numbers[0])[0] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.multiprocess
def test_ranks_that_train_different_students_find_out(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    """The gradients are averaged, and so the same; the rate of one rank is not."""
    ranks = Ranks(
        2,
        distill_cache.config_file(tmp_path),
        own_arguments=[("--set=training.lr=1e-3",), ("--set=training.lr=2e-3",)],
    )
    assert ranks.wait() == [6, 6], ranks.log.read_text()
    assert "the ranks train different students" in ranks.log.read_text()
    assert "a weight's sum in units of its norm is" in ranks.log.read_text()
