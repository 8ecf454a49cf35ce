"""The format on disk is what it was: literal bytes of every kind of file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "record_bytes.json").read_text())


@pytest.fixture(scope="module")
def built() -> dict:
    return load(GOLDEN / "record_bytes.py").build()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["latents", "latents_bound_to_the_catalog", "predictions"])
@pytest.mark.parametrize(
    "file", ["set_record", "record_hex", "index_hex", "tar_sha256", "manifest"]
)
def test_bytes_are_those_of_the_golden_file(kind: str, file: str, built: dict) -> None:
    assert built[kind][file] == EXPECTED[kind][file]
