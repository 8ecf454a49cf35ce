"""The optimizer's saved state: resuming bit for bit, refusing what does not belong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from support.optimizer_cases import all_bits, any_mode, assert_same_bits, own, train

from sdxl_distill.errors import CorruptError, IncompatibleError

pytestmark = pytest.mark.processors


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
