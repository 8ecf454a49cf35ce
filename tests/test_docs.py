"""What pages say of the code and only its import shows; `tests/house/rules.py` holds the rest."""

from __future__ import annotations

import re
from pathlib import Path

from sdxl_distill import errors

ROOT = Path(__file__).parents[1]


def test_every_error_has_its_row_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    for kind in errors.DistillError.__subclasses__():
        if kind.__module__ == errors.__name__:
            assert re.search(rf"^\| {kind.exit_code} \| `{kind.__name__}` \|", text, re.M), kind
