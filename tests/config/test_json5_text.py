"""Reading JSON with comments: what is refused, and where the error points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdxl_distill.config.json5_text import json_path, parse_json5, read_json5
from sdxl_distill.errors import ConfigError
from sdxl_distill.limits import MAX_CONFIG_BYTES


def _error(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_json5(path)
    return caught.value


def test_comments_and_trailing_commas_are_allowed(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"a": [1, 2,], // one\n /* two */ "b": 5e-6,}')
    assert read_json5(path) == {"a": [1, 2], "b": 5e-6}


def test_a_byte_order_mark_is_allowed(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{}", encoding="utf-8-sig")
    assert read_json5(path) == {}


def test_every_key_given_twice_is_named_by_its_path():
    _, twins = parse_json5('{"a": 1, "b": [{}, {"c": 1, "c": 2}], "a": {"d": 1, "d": 1}}')
    assert twins == ["b[1].c", "a", "a.d"]


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"training": {"lr": 1, "lr": 2}}')
    assert "training.lr is given more than once" in str(_error(path))


def test_a_syntax_error_names_the_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{\n"a": 1,\n"b" 2}')
    assert _error(path).where == f"{path}, line 3"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 5000, b"{'a': " + b"1" * 5000 + b"}"])
def test_what_is_no_configuration_at_all_is_refused(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    assert _error(path).where == str(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in _error(tmp_path / "absent.json").found


def test_a_folder_is_refused(tmp_path):
    assert "is not a regular file" in _error(tmp_path).found


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in _error(tmp_path / "fifo").found


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "c.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert str(MAX_CONFIG_BYTES) in str(_error(path))


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ((), ""),
        (("a",), "a"),
        (("teachers", 1, "weight"), "teachers[1].weight"),
        (("a.b", "", "c"), "['a.b'][''].c"),
    ],
)
def test_places_are_written_as_json_paths(location, path):
    assert json_path(location) == path
