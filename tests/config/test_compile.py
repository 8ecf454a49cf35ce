"""Ways of compiling: named, or the switch of earlier versions."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sdxl_distill.config.distill import TrainingSection


@pytest.mark.parametrize(
    ("written", "way"),
    [(True, "regional"), (False, "none"), ("none", "none"), ("full", "full")],
)
def test_the_switch_of_earlier_versions_is_a_way_of_compiling(written: object, way: str) -> None:
    assert TrainingSection.model_validate({"compile": written}).compile == way


@pytest.mark.parametrize("written", [1, 0, "true", "blocks", None])
def test_any_other_way_is_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        TrainingSection.model_validate({"compile": written})
