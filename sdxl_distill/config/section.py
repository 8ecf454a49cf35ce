"""The base of every configuration section, the field types they share, and the broken rule."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sdxl_distill.limits import MAX_SIDE_PX
from sdxl_distill.storage.path_text import fault_of_path


class Section(BaseModel):
    """A frozen group of keys; unknown keys and values of another type are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class BrokenRule(ValueError):  # noqa: N818 - a finding that the loader turns into a ConfigError
    """A rule over one or more keys does not hold.

    Args:
        found: the values that break the rule.
        expected: the values that would be right.
        key: the place below the section that raises; empty for the field itself.
        action: the next step for the user; None if `expected` says it.
    """

    def __init__(
        self,
        found: str,
        *,
        expected: str,
        key: tuple[str | int, ...] = (),
        action: str | None = None,
    ) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found = found
        self.expected = expected
        self.key = key
        self.action = action


def _check_safe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise BrokenRule(
            f'"{name}" cannot name a folder safely',
            expected="ASCII letters, digits, '.', '_' and '-', a letter or a digit first",
        )
    return name


def _check_place(place: str) -> str:
    fault = fault_of_path(place)
    if fault is not None:
        raise BrokenRule(f"this cannot be a path: {fault}", expected="a path, or a hub id")
    return place


def _compile_of_switch(value: object) -> object:
    """Read the switch that earlier versions had."""
    if isinstance(value, bool):
        return "regional" if value else "none"
    return value


Device = Literal["auto", "cuda", "cpu"]
StoredDtype = Literal["fp16", "bf16", "fp32"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

Compile = Annotated[Literal["none", "regional", "full"], BeforeValidator(_compile_of_switch)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_check_place)]
SafeName = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_check_safe_name)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Side = Annotated[int, Field(ge=8, le=MAX_SIDE_PX, multiple_of=8)]
Resolution = Annotated[tuple[Side, Side], Field(strict=False)]
