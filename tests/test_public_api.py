"""What `import sdxl_distill` gives, and what it does not cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sdxl_distill
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream


def test_the_package_exports_the_stream() -> None:
    assert sdxl_distill.JoinedStream is JoinedStream
    assert sdxl_distill.open_shard_set is open_shard_set


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'JoinedSteam'"):
        _ = sdxl_distill.JoinedSteam  # type: ignore[attr-defined]


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, sdxl_distill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
