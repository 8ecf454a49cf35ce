"""What cannot be a path is refused where it is given, and every path that can be is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_distill.cli.main import main
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.config.problem import leaves
from sdxl_distill.errors import ConfigError
from sdxl_distill.limits import MAX_NAME_BYTES, MAX_PATH_BYTES
from sdxl_distill.storage.path_text import fault_of_path

NO_PATHS = ["\0", "a\0b", "\ud800", "x" * 256, "é" * 128, "x/" * 1800]
PATHS = ["x" * MAX_NAME_BYTES, "x/" * (MAX_PATH_BYTES // 2), "caf\udce9", "a b", "水/é", "-"]
PLACES = [
    (BuilderConfig, "teacher.checkpoint_path"),
    (BuilderConfig, "data.image_dir"),
    (BuilderConfig, "data.latent_cache.cache_dir"),
    (BuilderConfig, "cache.output_dir"),
    (BuilderConfig, "model.id"),
    (BuilderConfig, "model.text_encoder_id"),
    (DistillConfig, "run.output_root"),
    (DistillConfig, "student.checkpoint_path"),
    (DistillConfig, "student.text_encoder_id"),
    (DistillConfig, "teachers.0.cache_dir"),
    (DistillConfig, "data.latent_cache.cache_dir"),
    (DistillConfig, "training.tensorboard.base_dir"),
]
BUILDER = {
    "teacher": {"checkpoint_path": "t", "teacher_id": "t"},
    "data": {"image_dir": "i"},
}
DISTILL = {
    "run": {"name": "r"},
    "student": {"checkpoint_path": "s"},
    "teachers": [{"teacher_id": "t"}],
}
ARGUMENTS = [
    ("verify-shards", "--cache-dir"),
    ("verify-shards", "--cache-dir", ".", "--against"),
    ("pack-shards", "--output", "o", "--input"),
    ("pack-shards", "--input", "i", "--output"),
    ("pack-shards", "--input", "i", "--output", "o", "--latents"),
    ("unpack-shards", "--output", "o", "--cache-dir"),
    ("unpack-shards", "--cache-dir", "c", "--output"),
    ("train", "--config"),
    ("train", "--config", "c", "--resume"),
    ("export-student", "--config", "c", "--checkpoint"),
    ("export-student", "--config", "c", "--output"),
    ("build-latents", "--config"),
    ("build-text", "--config"),
    ("build-shards", "--config"),
    ("demo", "--output"),
]


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_cannot_be_a_path_is_told(text: str) -> None:
    assert fault_of_path(text) is not None


@pytest.mark.parametrize("text", PATHS)
def test_what_can_be_a_path_is_one(text: str) -> None:
    assert fault_of_path(text) is None


@pytest.mark.parametrize("text", NO_PATHS)
@pytest.mark.parametrize(("schema", "key"), PLACES)
def test_every_place_in_a_configuration_is_checked(tmp_path, schema, key, text) -> None:
    tree = json.loads(json.dumps(BUILDER if schema is BuilderConfig else DISTILL))
    *sections, name = key.split(".")
    section = tree
    for part in sections:
        section = section[int(part)] if part.isdecimal() else section.setdefault(part, {})
    section[name] = text
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
        load_config(path, schema)
    assert name in str(caught.value)


def test_no_place_of_the_schemas_is_left_out() -> None:
    for schema in (BuilderConfig, DistillConfig):
        named = {key for each, key in PLACES if each is schema}
        found = {
            ".".join(leaf)
            for leaf in leaves(schema)
            if leaf[-1].endswith(("_dir", "_path", "_root"))
            or leaf[-1] in ("id", "text_encoder_id")
        }
        assert found == {key.replace(".0.", ".") for key in named}


@pytest.mark.parametrize("text", NO_PATHS)
@pytest.mark.parametrize(
    "arguments", ARGUMENTS, ids=lambda arguments: f"{arguments[0]}{arguments[-1]}"
)
def test_every_path_of_a_command_line_is_checked(capsys, arguments, text) -> None:
    command, *options = arguments
    with pytest.raises(SystemExit) as caught:
        main([command, *options, text])
    assert caught.value.code == 2
    assert f"argument {arguments[-1]}: not a path" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify-shards", "unpack-shards"])
def test_a_link_onto_itself_is_an_error_of_ours(tmp_path, command) -> None:
    (tmp_path / "loop").symlink_to("loop")
    options = ["--output", str(tmp_path / "o")] if command == "unpack-shards" else []
    assert main([command, "--cache-dir", str(tmp_path / "loop"), *options]) in (2, 5)


def test_a_path_that_is_no_utf8_is_printed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102 - bytes
    code = (
        "import sys; from sdxl_distill.cli.main import main; "
        "code = main(['verify-shards', *sys.argv[1:]]); "
        "print(repr(sys.argv[2])[1:-1]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--cache-dir", folder],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 2, done.stderr
    assert b"caf" in done.stdout
