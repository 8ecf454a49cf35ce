"""What `import sdxl_distill` gives, what it does not cost, and that docs/api.md is true of it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.distill_cache import BUCKETS, write_images

import sdxl_distill
from sdxl_distill.errors import DistillError

if TYPE_CHECKING:
    from sdxl_distill.demo.family import Family

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/api.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
TEACHERS = ("teacher_v8", "teacher_chaos")
NUM_IMAGES = 24


@pytest.fixture
def place(tmp_path: Path, tiny_family: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the page's session runs: images and three configurations."""
    write_images(tmp_path / "images", range(NUM_IMAGES))
    (tmp_path / "configs").mkdir()
    for teacher_id, checkpoint in zip(TEACHERS, tiny_family.teachers, strict=False):
        builder = {
            "teacher": {
                "checkpoint_path": str(checkpoint),
                "teacher_id": teacher_id,
                "use_bf16": False,
            },
            "data": {"image_dir": "images", "bucket": {"resolutions": BUCKETS}},
            "model": {"text_encoder_id": str(tiny_family.base)},
        }
        _write(tmp_path / f"configs/{teacher_id}.json", builder)
    teachers = [{"teacher_id": teacher_id, "weight": 0.5} for teacher_id in TEACHERS]
    student = {"checkpoint_path": str(tiny_family.base), "use_bf16": False}
    run = {"name": "student", "output_root": "runs"}
    _write(
        tmp_path / "configs/distill.json", {"run": run, "student": student, "teachers": teachers}
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), "utf-8")


def test_the_session_of_the_page_runs(place, capsys):
    session: dict[str, Any] = {"__name__": "session"}
    for example in EXAMPLES:
        exec(compile(example, "docs/api.md", "exec"), session)
    printed = capsys.readouterr().out
    assert f"{NUM_IMAGES} images in {len(BUCKETS)} shards" in printed
    assert f"predictions {NUM_IMAGES} records in {len(BUCKETS)} shards" in printed
    assert "3 steps, " in printed
    assert "cache/teacher_predictions/teacher_bs4" in printed
    assert "--resume latest" in printed
    assert (place / "runs/student/export/model_index.json").is_file()


def test_the_page_explains_every_public_name_and_no_other():
    table = PAGE.partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*)", table, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {*sdxl_distill.__all__}
    assert f"{len(sdxl_distill.__all__)} names" in table


def test_the_examples_import_every_public_name_that_is_no_error_from_the_package():
    imported = {
        alias.name
        for example in EXAMPLES
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.ImportFrom) and node.module == "sdxl_distill"
        for alias in node.names
    }
    errors = {kind.__name__ for kind in DistillError.__subclasses__()}
    assert imported >= {*sdxl_distill.__all__} - errors


@pytest.mark.parametrize("name", sdxl_distill.__all__)
def test_a_public_name_is_that_of_its_module(name):
    value = getattr(sdxl_distill, name)
    assert value.__name__ == name
    assert getattr(sys.modules[value.__module__], name) is value


def test_every_error_for_users_is_public():
    errors = [DistillError, *DistillError.__subclasses__()]
    assert {kind.__name__ for kind in errors if kind.__module__ == DistillError.__module__} <= {
        *sdxl_distill.__all__
    }


def test_a_public_name_is_no_package_which_would_hide_it():
    packages = {path.parent.name for path in (ROOT / "sdxl_distill").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "sdxl_distill").glob("*.py")}
    assert {*sdxl_distill.__all__} & (packages | modules) == set()


def test_type_checkers_see_what_the_package_gives():
    tree = ast.parse((ROOT / "sdxl_distill/__init__.py").read_text("utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: getattr(sdxl_distill, name).__module__ for name in sdxl_distill.__all__}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'JoinedSteam'"):
        _ = sdxl_distill.JoinedSteam  # type: ignore[attr-defined]


def test_importing_the_package_imports_none_of_its_modules() -> None:
    program = "import sys, sdxl_distill; print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert [name for name in output.split() if name.startswith("sdxl_")] == ["sdxl_distill"]
