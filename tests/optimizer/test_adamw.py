"""AdamW for 16-bit weights: against torch's, its slopes, its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.optimizer_cases import (
    MODES,
    SHAPES,
    Named,
    all_bits,
    any_mode,
    assert_same_bits,
    exact_weight,
    gradients,
    own,
    parameters,
    train,
)

from sdxl_distill.errors import ConfigError
from sdxl_distill.optimizer.adamw import AdamW, clip_factor, global_grad_norm, group_terms
from sdxl_distill.optimizer.parameter_update import updated
from sdxl_distill.optimizer.stochastic_rounding import int32_scalar

pytestmark = pytest.mark.processors


def slope(moves: torch.Tensor, right: torch.Tensor) -> float:
    return ((moves * right).sum() / (right * right).sum()).item()


def test_in_float32_it_equals_torchs_adamw() -> None:
    named, optimizer = own("fp32", betas=(0.8, 0.99), eps=1e-7, weight_decay=0.1)
    theirs = [(name, torch.nn.Parameter(p.detach().double())) for name, p in named]
    reference = torch.optim.AdamW(
        [p for _, p in theirs], lr=1e-3, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.1
    )
    train(named, optimizer, 120)
    train(theirs, reference, 120)

    for (_, parameter), (_, their_parameter) in zip(named, theirs, strict=True):
        # In float64, where torch's factor of the decay is not rounded to float32. 120 steps round
        # the weight once each, by up to 2^-24 of it. test_exact_steps.py compares bits.
        expected = their_parameter.float()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_a_parameter_that_gets_its_first_gradient_late_is_updated_as_torch_does() -> None:
    moved: list[torch.Tensor] = []
    for kind in (AdamW, torch.optim.AdamW):
        named = parameters(torch.float32, [(4, 4), (4, 4)])
        optimizer = kind([p for _, p in named], lr=1e-3)
        for step in range(6):
            named[0][1].grad = torch.full((4, 4), 0.5)
            named[1][1].grad = torch.full((4, 4), 0.5) if step >= 3 else None
            optimizer.step()
        moved.append(named[1][1].detach())

    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-8)


def test_torchs_schedulers_set_its_learning_rate() -> None:
    weights: list[torch.Tensor] = []
    for kind in (AdamW, torch.optim.AdamW):
        named = parameters(torch.float32, [(8, 8)])
        optimizer = kind([p for _, p in named], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for number in range(10):
            train(named, optimizer, 1, first=number)
            scheduler.step()
        weights.append(named[0][1].detach())

    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["fp32", "bf16-master"])
def test_a_decay_below_the_last_bit_of_a_factor_arrives(mode: str) -> None:
    """Where 1 - lr · decay is exactly 1 in float32."""
    dtype, settings = MODES[mode]
    num_steps, decay = 200, 1e-6 * 0.01
    assert torch.tensor(1 - decay, dtype=torch.float32) == 1
    generator = torch.Generator().manual_seed(1)
    start = ((torch.rand(512, 512, generator=generator) + 0.5) * 0.02).bfloat16()
    ends: list[torch.Tensor] = []
    for weight_decay in (0.01, 0.0):
        named: Named = [("matrix", torch.nn.Parameter(start.to(dtype, copy=True)))]
        optimizer = AdamW(named, lr=1e-6, weight_decay=0.0, **settings)
        # The first steps move all weights alike, and round them alike.
        train(named, optimizer, 10)
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        train(named, optimizer, num_steps, first=10)
        ends.append(exact_weight(optimizer, named[0][1]).detach().double())

    # Each of 2 · 200 roundings errs evenly within one bit of weights below 2^-5: the mean over
    # all elements is known to that bit · √(400 / 12 / elements), and is to be within five of it.
    found, expected = (ends[0] - ends[1]).mean(), start.double().mean() * ((1 - decay) ** 200 - 1)
    error = 2.0**-29 * (2 * num_steps / 12 / start.numel()) ** 0.5
    assert abs(found - expected) < 5 * error < 5e-3 * abs(expected)


def moves_at_small_rate(
    make: Callable[[Named], torch.optim.Optimizer], dtype: torch.dtype
) -> torch.Tensor:
    """How far a matrix moves in 40 steps; float32, all start from the same bfloat16 numbers."""
    generator = torch.Generator().manual_seed(3)
    start = (torch.randn(128, 512, generator=generator) * 0.05).bfloat16()
    named: Named = [("matrix", torch.nn.Parameter(start.to(dtype, copy=True)))]
    train(named, make(named), 40)
    return named[0][1].detach().float() - start.float()


@pytest.fixture(scope="module")
def right_moves() -> torch.Tensor:
    return moves_at_small_rate(
        lambda named: torch.optim.AdamW([p for _, p in named], lr=5e-6), torch.float32
    )


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_bfloat16_weights_get_the_whole_update_at_a_small_learning_rate(
    right_moves: torch.Tensor, states: Any
) -> None:
    moves = moves_at_small_rate(lambda named: AdamW(named, lr=5e-6, states=states), torch.bfloat16)

    assert slope(moves, right_moves) == pytest.approx(1.0, abs=0.02)


def test_torchs_adamw_loses_the_update_of_bfloat16_weights(right_moves: torch.Tensor) -> None:
    moves = moves_at_small_rate(
        lambda named: torch.optim.AdamW([p for _, p in named], lr=5e-6), torch.bfloat16
    )

    assert slope(moves, right_moves) < 0.15


def test_exact_masters_move_by_the_whole_update(right_moves: torch.Tensor) -> None:
    made: list[tuple[AdamW, torch.Tensor]] = []

    def make(named: Named) -> AdamW:
        made.append((AdamW(named, lr=5e-6, exact_masters=True), named[0][1]))
        return made[0][0]

    rounded = moves_at_small_rate(make, torch.bfloat16)
    optimizer, parameter = made[0]
    start = parameter.detach().float() - rounded

    moves = exact_weight(optimizer, parameter) - start
    assert slope(moves, right_moves) == pytest.approx(1.0, abs=0.005)


def test_eight_bit_states_follow_float32_states_over_four_decades_of_gradients() -> None:
    scales = torch.logspace(-4, 0, 256).repeat(2)
    start = torch.zeros(32, 512)
    moves: dict[str, torch.Tensor] = {}
    for states in ("fp32", "8bit"):
        named: Named = [("matrix", torch.nn.Parameter(start.clone()))]
        optimizer = AdamW(named, lr=1e-4, weight_decay=0.0, states=states)
        for (gradient,) in gradients(named, 500):
            named[0][1].grad = gradient * scales
            optimizer.step()
        moves[states] = named[0][1].detach()

    for decade in (scales < 1e-3, scales > 1e-1, scales > 0):
        found = slope(moves["8bit"][:, decade], moves["fp32"][:, decade])
        assert found == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.99, 0.9999)])
def test_eight_bit_moments_forget_gradients_that_were_larger(betas: tuple[float, float]) -> None:
    # A step takes 1 % or less off a moment and a code is 3 to 12 % wide: rounding to nearest
    # never moves. Every second gradient stays large, so that the scale of a block does not fall.
    falls = torch.arange(512) % 2 == 0
    moves: list[torch.Tensor] = []
    for states in ("fp32", "8bit"):
        named: Named = [("matrix", torch.nn.Parameter(torch.zeros(16, 512)))]
        optimizer = AdamW(named, 1e-4, betas, weight_decay=0.0, states=states)
        for step, (gradient,) in enumerate(gradients(named, 400)):
            named[0][1].grad = torch.where(falls, gradient * 0.01, gradient)
            if step < 50:
                named[0][1].grad = gradient
            if step == 100:
                named[0][1].detach().zero_()
            optimizer.step()
        moves.append(named[0][1].detach()[:, falls])

    assert slope(moves[1], moves[0]) == pytest.approx(1.0, abs=0.1)


def test_an_element_far_below_its_blocks_largest_never_takes_a_huge_step() -> None:
    named: Named = [("matrix", torch.nn.Parameter(torch.zeros(16, 512)))]
    optimizer = AdamW(named, lr=1e-4, weight_decay=0.0, states="8bit")
    scales = torch.logspace(-9, 0, 256).repeat(2)
    for (gradient,) in gradients(named, 100):
        named[0][1].grad = gradient * scales
        optimizer.step()

    # With float32 states 100 steps move an element by at most 100 × the learning rate.
    assert named[0][1].abs().max() < 3 * 100 * 1e-4


def test_an_exact_master_has_the_bits_of_a_float32_weight() -> None:
    named, optimizer = own("bf16-master")
    start = [parameter.detach().float() for _, parameter in named]
    full: Named = [(name, torch.nn.Parameter(w)) for (name, _), w in zip(named, start, strict=True)]
    full_optimizer = AdamW(full, lr=1e-3)
    for step_gradients in gradients(named, 60):
        for (_, parameter), (_, full_parameter), gradient in zip(
            named, full, step_gradients, strict=True
        ):
            parameter.grad = gradient.bfloat16()
            full_parameter.grad = parameter.grad.float()
        optimizer.step()
        full_optimizer.step()

    for (name, parameter), (_, full_parameter) in zip(named, full, strict=True):
        assert torch.equal(exact_weight(optimizer, parameter), full_parameter.detach()), name


@any_mode
@pytest.mark.parametrize("chunk_elements", [300, 1500])
def test_chunks_change_no_bit(mode: str, chunk_elements: int) -> None:
    named, optimizer = own(mode)
    chunked, chunked_optimizer = own(mode, chunk_elements=chunk_elements)
    train(named, optimizer, 3)
    train(chunked, chunked_optimizer, 3)

    assert_same_bits(all_bits(chunked, chunked_optimizer), all_bits(named, optimizer))


def test_a_shard_of_rows_is_updated_as_in_the_whole() -> None:
    named, optimizer = own("bf16-8bit")
    train(named, optimizer, 2)
    _, parameter = named[0]
    state = {name: tensor.clone() for name, tensor in optimizer.state[parameter].items()}
    before = parameter.detach().clone()
    group = optimizer.param_groups[0]
    train(named, optimizer, 1, first=2)
    terms = optimizer._keyed(group_terms(group, optimizer._steps[0], torch.tensor(1.0)), 0)

    assert parameter.grad is not None
    shard = slice(11, 16)
    weight, _ = updated(
        before[shard],
        parameter.grad[shard],
        {name: tensor[shard] for name, tensor in state.items()},
        terms,
        int32_scalar(11 * 512),
        block=256,
    )

    assert torch.equal(weight, parameter.detach()[shard])


def test_the_memory_format_of_a_weight_changes_no_bit() -> None:
    named, optimizer = own("bf16-8bit")
    other, _ = own("bf16-8bit")
    name, convolution = other[1]
    other[1] = (
        name,
        torch.nn.Parameter(convolution.detach().to(memory_format=torch.channels_last)),
    )
    other_optimizer = AdamW(other, lr=1e-3, seed=7, states="8bit")
    train(named, optimizer, 3)
    train(other, other_optimizer, 3)

    assert not other[1][1].is_contiguous()
    assert_same_bits(all_bits(other, other_optimizer), all_bits(named, optimizer))


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    named, optimizer = own("bf16-8bit")
    before = torch.get_rng_state()
    train(named, optimizer, 2)

    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_rounds_otherwise() -> None:
    named, optimizer = own("bf16")
    other, other_optimizer = own("bf16", seed=8)
    train(named, optimizer, 1)
    train(other, other_optimizer, 1)

    assert not torch.equal(named[0][1], other[0][1])


def test_eight_bit_states_take_about_two_bytes_an_element() -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 320, 3, 3, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], states="8bit")

    num_bytes = sum(tensor.nbytes for tensor in optimizer.state[parameter].values())

    assert num_bytes / parameter.numel() == pytest.approx(2.03, abs=0.01)


@pytest.mark.parametrize(
    ("dtype", "exact_masters"), [(torch.float64, False), (torch.float16, True)]
)
def test_weights_that_it_cannot_keep_right_are_refused(
    dtype: torch.dtype, exact_masters: bool
) -> None:
    with pytest.raises(ConfigError, match=str(dtype)):
        AdamW(parameters(dtype), exact_masters=exact_masters)


@any_mode
def test_a_gradient_of_nan_is_never_hidden(mode: str) -> None:
    named, optimizer = own(mode)
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()

    assert all(parameter.isnan().all() for _, parameter in named)


@any_mode
def test_a_step_reads_nothing_back_to_the_host(mode: str) -> None:
    # A tensor on the meta device has no values: whatever asks for one raises.
    dtype, settings = MODES[mode]
    named = [
        (f"{n}", torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
        for n, shape in enumerate(SHAPES)
    ]
    optimizer = AdamW(named, **settings)
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    norm = global_grad_norm(parameter for _, parameter in named)
    optimizer.step(clip_factor(norm, 1.0))

    assert optimizer.state_tensors()["steps"].tolist() == [1] * len(SHAPES)


def test_the_factor_scales_the_gradients() -> None:
    named, optimizer = own("fp32")
    scaled, scaled_optimizer = own("fp32")
    for (_, parameter), (_, other) in zip(named, scaled, strict=True):
        parameter.grad = torch.full_like(parameter, 0.5)
        other.grad = torch.full_like(parameter, 4.0)
    optimizer.step()
    scaled_optimizer.step(torch.tensor(0.125))

    assert_same_bits(all_bits(scaled, scaled_optimizer), all_bits(named, optimizer))


def test_the_norm_of_bfloat16_gradients_is_accumulated_in_float32() -> None:
    named = parameters(torch.bfloat16, [(1000, 1000), (300, 300)])
    for (_, parameter), gradient in zip(named, next(gradients(named, 1)), strict=True):
        parameter.grad = gradient.bfloat16()
    exact = sum(p.grad.double().square().sum() for _, p in named if p.grad is not None) ** 0.5

    norm = global_grad_norm(parameter for _, parameter in named)

    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [(4.0, 0.25), (0.5, 1.0), (0.0, 1.0)])
def test_only_norms_above_the_limit_are_scaled_down(norm: float, expected: float) -> None:
    assert clip_factor(torch.tensor(norm), 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_the_update_is_one_graph_that_serves_every_step() -> None:
    torch.compiler.reset()
    compiled = torch.compile(updated, fullgraph=True, backend="aot_eager")
    named, optimizer = own("bf16-8bit")
    _, parameter = named[0]
    group, state = optimizer.param_groups[0], optimizer.state[parameter]
    gradient = torch.ones(16, 512, dtype=torch.bfloat16)

    def step(number: int) -> None:
        optimizer._steps[0] = number
        terms = optimizer._keyed(group_terms(group, number, torch.tensor(1.0 / number)), 0)
        arguments = (parameter.detach(), gradient, state, terms, int32_scalar(number), 256)
        assert torch.equal(compiled(*arguments)[0], updated(*arguments)[0])

    with torch.no_grad():
        step(1)
        with torch.compiler.set_stance("fail_on_recompile"):
            step(2)
            step(3)
