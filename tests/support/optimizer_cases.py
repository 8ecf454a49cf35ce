"""Weights, gradients and settings that the tests of the optimizer have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sdxl_distill.optimizer.adamw import AdamW
from sdxl_distill.optimizer.stochastic_rounding import join_master

# A matrix and a convolution with 8-bit states, and three tensors that keep float32 ones.
SHAPES = [(16, 512), (12, 40, 3, 3), (10, 33), (5000,), ()]
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32-8bit": (torch.float32, {"states": "8bit"}),
    "bf16": (torch.bfloat16, {}),
    "bf16-8bit": (torch.bfloat16, {"states": "8bit"}),
    "bf16-master": (torch.bfloat16, {"exact_masters": True}),
    "bf16-8bit-master": (torch.bfloat16, {"states": "8bit", "exact_masters": True}),
    "fp16": (torch.float16, {}),
    "fp16-8bit": (torch.float16, {"states": "8bit"}),
}
any_mode = pytest.mark.parametrize("mode", MODES)
Named = list[tuple[str, torch.nn.Parameter]]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> Named:
    generator = torch.Generator().manual_seed(1)
    return [
        (f"layer.{n}", torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype) * 0.05))
        for n, shape in enumerate(shapes)
    ]


def exact_weight(optimizer: AdamW, parameter: torch.Tensor) -> torch.Tensor:
    """The float32 value of a parameter, with its remainder where there is one."""
    remainder = optimizer.remainder(parameter)
    return parameter.float() if remainder is None else join_master(parameter.detach(), remainder)


def gradients(named: Named, num_steps: int, first: int = 0) -> Iterator[list[torch.Tensor]]:
    """A steady direction and noise of the same size; a function of the step number."""
    steady = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=steady) for _, p in named]
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(1000 + step)
        yield [d + torch.randn(d.shape, generator=generator) for d in directions]


def train(named: Named, optimizer: torch.optim.Optimizer, num_steps: int, first: int = 0) -> None:
    for step_gradients in gradients(named, num_steps, first):
        for (_, parameter), gradient in zip(named, step_gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def own(mode: str, **overrides: Any) -> tuple[Named, AdamW]:
    dtype, settings = MODES[mode]
    named = parameters(dtype)
    return named, AdamW(named, **{"lr": 1e-3, "seed": 7, **settings, **overrides})


def all_bits(named: Named, optimizer: AdamW) -> dict[str, torch.Tensor]:
    weights = {name: parameter.detach().clone() for name, parameter in named}
    return weights | {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
