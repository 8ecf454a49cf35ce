"""The exception tree: exit codes, texts, and crossing process boundaries."""

from __future__ import annotations

import copy

import pytest

from sdxl_distill import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 2),
        (errors.CorruptError, 3),
        (errors.IncompatibleError, 4),
        (errors.StorageError, 5),
        (errors.NumericalError, 6),
        (errors.Preempted, 75),
    ],
)
def test_each_branch_has_its_exit_code(kind: type[errors.DistillError], code: int) -> None:
    assert kind("found").exit_code == code


def test_text_says_where_found_expected_and_what_to_do() -> None:
    error = errors.CorruptError("3 bytes", expected="4 bytes", where="a.idx", action="run again")
    assert str(error) == "a.idx: 3 bytes; expected 4 bytes\n  → run again"
    assert str(errors.ConfigError("3 bytes")) == "3 bytes"


def test_parts_survive_copying() -> None:
    error = errors.StorageError("full", expected="space", where="disk", action="free some")
    twin = copy.copy(error)
    assert type(twin) is errors.StorageError
    assert (twin.found, twin.expected, twin.where, twin.action) == (
        "full", "space", "disk", "free some",
    )  # fmt: skip
