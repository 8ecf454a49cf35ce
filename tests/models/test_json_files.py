from __future__ import annotations

import pytest

from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.models.json_files import MAX_JSON_BYTES, read_json


def test_an_object_is_read_as_it_stands(tmp_path):
    (tmp_path / "config.json").write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"a": [1, 2.5, None, "é"]}


def test_a_missing_file_is_a_config_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"text"', b'{"a": 1, "a": 2}', b"\xff\xfe{}", b"[" * 100_000],
    ids=["empty", "cut", "list", "text", "twice", "encoding", "deep"],
)
def test_what_is_no_single_object_is_corrupt(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CorruptError, match="at most"):
        read_json(tmp_path / "config.json")
