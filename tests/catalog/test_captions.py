"""Where a caption comes from, and what a caption file must be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdxl_distill.catalog.captions import (
    caption_name,
    metadata_caption,
    read_caption,
    read_metadata,
)
from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_CAPTION_BYTES


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_txt_comes_before_caption() -> None:
    assert caption_name("a.b.jpg", {"a.b.txt", "a.b.caption", "a.b.jpg"}) == "a.b.txt"
    assert caption_name("a.b.jpg", {"a.b.caption", "a.txt"}) == "a.b.caption"
    assert caption_name("a.jpg", {"b.txt", "a.jpg"}) is None


def test_white_space_and_byte_order_mark_are_no_part_of_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  zwei Füchse,\nim Schnee \r\n".encode())
    assert read_caption(path) == "zwei Füchse,\nim Schnee"


def test_a_caption_that_is_no_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(CorruptError, match="byte 3 is not UTF-8") as caught:
        read_caption(path)
    assert caught.value.where == str(path)


def test_a_huge_caption_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (MAX_CAPTION_BYTES + 1))
    with pytest.raises(CorruptError, match=f"at most {MAX_CAPTION_BYTES} bytes"):
        read_caption(path)


def test_a_fifo_in_place_of_a_caption_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    os.mkfifo(path)
    with pytest.raises(CorruptError, match="not a regular file"):
        read_caption(path)


def test_a_link_to_nowhere_in_place_of_a_caption_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.symlink_to("nothing")
    with pytest.raises(CorruptError, match="leads nowhere"):
        read_caption(path)


def test_metadata_gives_text_before_caption_and_empty_for_neither(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": " one ", "caption": "two"},
        {"file_name": "b/c.png", "caption": "three"},
        {"file_name": "./d.png", "text": None, "label": 3},
    )
    path.write_text(path.read_text() + "\n\n")
    assert read_metadata(path) == {"a.png": "one", "b/c.png": "three", "d.png": ""}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "names no file"),
        ('{"text": "x"}', "names no file"),
        ('{"file_name": "b.png", "text": 3}', "not text"),
        ('{"file_name": "b.png", "text": "\\ud800"}', "not text"),
        ('{"file_name": "a.png", "text": "other"}', "second caption"),
    ],
)
def test_a_bad_line_of_metadata_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "one"}\n' + line)
    with pytest.raises(CorruptError, match=fault) as caught:
        read_metadata(path)
    assert caught.value.where == f"{path}, line 2"


def test_the_nearest_metadata_that_names_the_image_counts() -> None:
    metadata = {
        "": {"a.png": "top a", "x/b.png": "top b", "x/y/c.png": "top c"},
        "x": {"b.png": "x b"},
        "x/y": {},
    }
    assert metadata_caption("a.png", metadata) == "top a"
    assert metadata_caption("x/b.png", metadata) == "x b"
    assert metadata_caption("x/y/c.png", metadata) == "top c"
    assert metadata_caption("x/z.png", metadata) is None


def test_a_huge_caption_in_metadata_is_refused_by_its_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "é" * (MAX_CAPTION_BYTES // 2)},
        {"file_name": "b.png", "text": "é" * (MAX_CAPTION_BYTES // 2) + "e"},
    )
    with pytest.raises(CorruptError, match=f"at most {MAX_CAPTION_BYTES}") as caught:
        read_metadata(path)
    assert caught.value.where == f"{path}, line 2"
