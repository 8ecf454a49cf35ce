"""One AdamW step of some rows of a parameter, as a pure function of tensors.

In: weight, gradient, state and the terms of the step. Out: the new weight and state. `updated`
mutates nothing, reads nothing back to the host and draws from no generator, so it can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from sdxl_distill.optimizer.state_codec import EXP_AVG_CODE, EXP_AVG_SQ_ROOT_CODE
from sdxl_distill.optimizer.stochastic_rounding import (
    RoundingKey,
    high_half,
    join_master,
    low_half,
    random_words,
    round_stochastically,
    split_master,
)


class StepTerms(NamedTuple):
    """What one step of one parameter needs besides tensors of the parameter's size.

    Whatever changes from step to step is a scalar tensor, so that `updated` is compiled only once.
    """

    beta1: float
    beta2: float
    eps: float
    step_size: torch.Tensor
    decay: torch.Tensor
    root_correction: torch.Tensor
    grad_scale: torch.Tensor
    weight_key: RoundingKey
    state_key: RoundingKey


RowUpdate = Callable[
    [torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], StepTerms, torch.Tensor],
    tuple[torch.Tensor, dict[str, torch.Tensor]],
]
"""`updated` with its block given."""


def adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    terms: StepTerms,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the next weight and moments; all float32 and of one shape.

    Source: Loshchilov and Hutter (2019), algorithm 2, lines 6–12, bias corrections gathered in
    the step size and the root as torch does it.
    """
    # Single operations only: fused ones round differently in a vector's tail, and then the
    # result would depend on where a chunk ends. The decay joins the update before the weight does:
    # the factor 1 - lr·wd is exactly 1 in float32 where lr·wd is below 3e-8.
    exp_avg = exp_avg + (grad - exp_avg) * (1 - terms.beta1)
    exp_avg_sq = exp_avg_sq * terms.beta2 + grad * grad * (1 - terms.beta2)
    denominator = exp_avg_sq.sqrt() / terms.root_correction + terms.eps
    change = exp_avg / denominator * terms.step_size + weight * terms.decay
    return weight - change, exp_avg, exp_avg_sq


def step_in_place(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    terms: StepTerms,
) -> None:
    """Do what `adamw` does, to many float32 tensors at once and in place.

    The same single operations in the same order, so the result is the same to the last bit; only
    the time between them is saved, which is most of it for small tensors.

    Args:
        weights: contiguous weights.
        grads: gradients of the same shapes, any floating dtype.
        exp_avgs: first moments of the same shapes.
        exp_avg_sqs: second moments of the same shapes.
        terms: this step's terms, the same for all.
    """
    # First moment.
    scaled = torch._foreach_mul([grad.to(torch.float32) for grad in grads], terms.grad_scale)
    change = torch._foreach_sub(scaled, exp_avgs)
    torch._foreach_mul_(change, 1 - terms.beta1)
    torch._foreach_add_(exp_avgs, change)

    # Second moment.
    torch._foreach_mul_(scaled, scaled)
    torch._foreach_mul_(scaled, 1 - terms.beta2)
    torch._foreach_mul_(exp_avg_sqs, terms.beta2)
    torch._foreach_add_(exp_avg_sqs, scaled)

    # Weight.
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, terms.root_correction)
    torch._foreach_add_(denominators, terms.eps)
    change = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(change, terms.step_size)
    torch._foreach_add_(change, torch._foreach_mul(weights, terms.decay))
    torch._foreach_sub_(weights, change)


def updated(
    weight: torch.Tensor,
    grad: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    terms: StepTerms,
    first_element: torch.Tensor,
    block: int | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the next weight and state of some rows of a parameter; pure.

    Args:
        weight: [rows, row elements], float32, bfloat16 or float16.
        grad: gradient of the same shape, any floating dtype.
        state: the same rows of what `AdamW` keeps.
        terms: the terms of this step and parameter.
        first_element: number of the first element in the whole parameter, int32 on the CPU.
        block: number of elements per scale; None for float32 states.
    """
    # The step itself, in float32.
    remainder = state.get("remainder")
    exact = weight.to(torch.float32) if remainder is None else join_master(weight, remainder)
    exact, exp_avg, exp_avg_sq = adamw(
        exact, grad.to(torch.float32) * terms.grad_scale, *_read_moments(state, block), terms
    )

    def words(key: RoundingKey) -> torch.Tensor:
        return random_words(key, first_element, weight.numel(), weight.device)

    # Back to what is stored.
    if block is None:
        new_state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    else:
        new_state = _encode_moments(exp_avg, exp_avg_sq, words(terms.state_key), block)
    if remainder is not None:
        new_weight, new_state["remainder"] = split_master(exact)
    elif weight.dtype == torch.float32:
        new_weight = exact
    else:
        random16 = high_half(words(terms.weight_key)).view(weight.shape)
        new_weight = round_stochastically(exact, weight.dtype, random16)
    return new_weight, new_state


@cache
def row_update(block: int | None, *, compiled: bool) -> RowUpdate:
    """Return `updated` for one length of a block, its last argument.

    Args:
        block: number of elements per scale; None for float32 states.
        compiled: true fuses it into a few kernels, for rows of any number and length.
    """

    def update_rows(*rows: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return updated(*rows, block=block)

    return torch.compile(update_rows, dynamic=True) if compiled else update_rows


def _read_moments(
    state: Mapping[str, torch.Tensor], block: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both moments as float32 [rows, row elements]."""
    if block is None:
        return state["exp_avg"], state["exp_avg_sq"]
    exp_avg, root = (
        code.decode(
            state[f"{name}_codes"].reshape(-1, block), state[f"{name}_scales"].reshape(-1)
        ).view(state[f"{name}_codes"].shape)
        for code, name in ((EXP_AVG_CODE, "exp_avg"), (EXP_AVG_SQ_ROOT_CODE, "exp_avg_sq_root"))
    )
    return exp_avg, root * root


def _encode_moments(
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, words: torch.Tensor, block: int
) -> dict[str, torch.Tensor]:
    """Return the 8-bit state of float32 moments; the second is kept as its root."""
    num_rows = exp_avg.shape[0]
    words = words.view(-1, block)
    state: dict[str, torch.Tensor] = {}
    for name, code, values, random16 in (
        ("exp_avg", EXP_AVG_CODE, exp_avg, high_half(words)),
        ("exp_avg_sq_root", EXP_AVG_SQ_ROOT_CODE, exp_avg_sq.sqrt(), low_half(words)),
    ):
        codes, scales = code.encode(values.view(-1, block), random16)
        state[f"{name}_codes"] = codes.view(exp_avg.shape)
        state[f"{name}_scales"] = scales.view(num_rows, -1)
    return state
