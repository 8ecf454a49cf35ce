"""A text that cannot be a path is refused by name, from Python as on a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sdxl_distill import open_shard_set
from sdxl_distill.errors import ConfigError
from sdxl_distill.storage.fsio import Directory


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "x" * 256])
@pytest.mark.parametrize("open_place", [open_shard_set, Directory])
def test_what_cannot_be_a_path_is_told_so(open_place: Callable[[str], Any], text: str) -> None:
    with pytest.raises(
        ConfigError, match="cannot be a path: (it contains|one of its names has)"
    ) as caught:
        open_place(text)
    str(caught.value).encode()  # can be printed
    assert "\0" not in str(caught.value)
