"""The figures that `make house` prints are counted: on modules written for the test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from figures import figures
from source import Source

LOSS = '''"""Losses."""

from __future__ import annotations


# Why it is so.
def loss(student: float, mean, *, weight: float = 1.0) -> float:
    """Return it.

    Args:
        student: of the student.
        mean: the teachers' average.
        weight: which the user gave,
            for each record.
    """
    return weight * (student - mean) ** 2  # squared


def _hidden(value): ...


class Open:
    def public(self, value: int) -> int: ...
'''
TRAIN = '''"""Trains."""

from sdxl_distill.core.loss import loss
from sdxl_distill.core import schedule
'''


@pytest.fixture
def shown() -> dict[str, str]:
    schedule = '"""Order."""\n\nfrom sdxl_distill.core.loss import loss\n'
    modules = [
        Source("sdxl_distill/core/loss.py", LOSS),
        Source("sdxl_distill/core/schedule.py", schedule),
        Source("sdxl_distill/cli/train.py", TRAIN),
    ]
    return dict(figures(modules))


def test_definitions_arguments_and_comments_are_counted(shown):
    assert shown["public definitions with a docstring"] == "33.3% (1 of 3)"
    assert shown["arguments annotated"] == "60.0% (3 of 5)"
    assert shown["comment lines among all that are not blank"] == "5.0% (1 of 20)"
    assert shown["longest function"] == "10 lines, `core.loss.loss`"


def test_entries_that_are_no_phrases_are_counted(shown):
    assert shown["Args entries that are fragments"] == "2 of 3"


def test_imports_are_told_apart_and_followed_to_the_answer(shown):
    assert shown["imports inside a package / across packages"] == "1 / 2"
    assert shown["files to read: where is the loss?"] == (
        "1 by name (`core.loss`), 2 by imports: cli.train → core.loss"
    )


def test_the_architecture_quotes_every_figure(shown):
    page = Path(__file__).parents[2] / "docs/architecture.md"
    quoted = page.read_text("utf-8").partition("| measured | here |")[2]
    assert re.findall(r"^\| (.+?) \| .+ \|$", quoted, re.M) == list(shown)
