"""The optimizer's saved state: resuming bit for bit, refusing what does not belong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.train.optimizer import AdamW

# Two tensors with 8-bit states, one that keeps float32 ones.
SHAPES = [(16, 512), (12, 40, 3, 3), (10, 33)]
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


def own(mode: str, **overrides: Any) -> tuple[Named, AdamW]:
    dtype, settings = MODES[mode]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) * 0.05 for shape in SHAPES]
    named = [(f"layer.{n}", torch.nn.Parameter(w.to(dtype))) for n, w in enumerate(weights)]
    return named, AdamW(named, **{"lr": 1e-3, "seed": 7, **settings, **overrides})


def train(named: Named, optimizer: AdamW, num_steps: int, first: int = 0) -> None:
    """Step with gradients that are a function of the step number."""
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def all_bits(named: Named, optimizer: AdamW) -> dict[str, torch.Tensor]:
    weights = {name: parameter.detach().clone() for name, parameter in named}
    return weights | {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@any_mode
def test_saved_and_loaded_midway_it_goes_on_bit_for_bit(mode: str) -> None:
    named, optimizer = own(mode)
    train(named, optimizer, 5)
    saved = all_bits(named, optimizer)
    saved_bytes = safetensors.torch.save(optimizer.state_tensors())
    scalars = json.loads(json.dumps(optimizer.state_scalars()))
    train(named, optimizer, 5, first=5)

    resumed, resumed_optimizer = own(mode)
    train(resumed, resumed_optimizer, 2)  # whatever it held before must not matter
    with torch.no_grad():
        for name, parameter in resumed:
            parameter.copy_(saved[name])
    resumed_optimizer.load_state_tensors(safetensors.torch.load(saved_bytes), scalars)
    train(resumed, resumed_optimizer, 5, first=5)

    assert_same_bits(all_bits(resumed, resumed_optimizer), all_bits(named, optimizer))


def test_saved_names_are_those_of_the_parameters() -> None:
    _, optimizer = own("bf16-8bit-master")

    assert [name for name in optimizer.state_tensors() if "layer.0" in name] == [
        "layer.0/exp_avg_codes",
        "layer.0/exp_avg_scales",
        "layer.0/exp_avg_sq_root_codes",
        "layer.0/exp_avg_sq_root_scales",
        "layer.0/remainder",
    ]


@pytest.mark.parametrize(
    ("override", "named_field"),
    [
        ({"states": "fp32"}, "states"),
        ({"exact_masters": True}, "exact_masters"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_state_of_other_settings_is_refused(override: dict[str, Any], named_field: str) -> None:
    _, optimizer = own("bf16-8bit")
    _, other = own("bf16-8bit", **override)

    with pytest.raises(IncompatibleError, match=named_field):
        optimizer.load_state_tensors(other.state_tensors(), other.state_scalars())


@pytest.mark.parametrize("change", ["missing", "unknown", "dtype", "shape"])
def test_a_state_of_other_tensors_is_refused_and_named(change: str) -> None:
    named, optimizer = own("bf16-8bit")
    tensors, scalars = optimizer.state_tensors(), optimizer.state_scalars()
    name = "layer.1/exp_avg_scales"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors[name := "layer.9/exp_avg"] = torch.zeros(1)
    elif change == "dtype":
        tensors[name] = tensors[name].bfloat16()
    else:
        tensors[name] = tensors[name][:3]
    before = all_bits(named, optimizer)

    with pytest.raises(IncompatibleError, match=name):
        optimizer.load_state_tensors(tensors, scalars)
    assert_same_bits(all_bits(named, optimizer), before)


@pytest.mark.parametrize(("name", "value"), [("layer.2/exp_avg", float("nan")), ("steps", -1)])
def test_impossible_values_in_a_state_are_refused_and_named(name: str, value: float) -> None:
    _, optimizer = own("bf16-8bit")
    tensors = optimizer.state_tensors()
    tensors[name] = torch.full_like(tensors[name], value)

    with pytest.raises(CorruptError, match=name):
        optimizer.load_state_tensors(tensors, optimizer.state_scalars())


def test_torchs_own_loader_is_refused() -> None:
    _, optimizer = own("bf16")

    with pytest.raises(IncompatibleError, match="load_state_tensors"):
        optimizer.load_state_dict(optimizer.state_dict())
