"""JSON of strangers: what is taken, and each thing that is refused by its own name."""

from __future__ import annotations

from typing import Any

import pytest

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.bounded_json import parse_json, require_names


@pytest.mark.parametrize("value", [b"3", b'"text"', b"true", b"null", b"[]", b'{"a":[1.5,{}]}'])
def test_any_json_is_taken_as_it_is(value: bytes) -> None:
    known: dict[bytes, Any] = {
        b"3": 3, b'"text"': "text", b"true": True, b"null": None, b"[]": [], b'{"a":[1.5,{}]}':
        {"a": [1.5, {}]},
    }  # fmt: skip
    assert parse_json(value, "x", max_bytes=len(value)) == known[value]


@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_at_most_eight_containers_are_nested(left: bytes, right: bytes) -> None:
    def nested(num_containers: int) -> bytes:
        return left * num_containers + b"1" * (left != b"[") + right * num_containers

    assert parse_json(nested(8), "x", max_bytes=1000)
    with pytest.raises(CorruptError, match="nested too deeply"):
        parse_json(nested(9), "x", max_bytes=1000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":1,"a":1}', "a name twice"),
        (b"[NaN]", "the value NaN"),
        (b"[1e999]", "too large"),
        (b"[1,]", "cannot be parsed"),
        (b"[\xff]", "cannot be parsed"),
    ],
)
def test_what_parsers_disagree_on_is_refused_by_name(content: bytes, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        parse_json(content, "x", max_bytes=100)


def test_an_object_has_the_names_that_were_asked_for_and_no_others() -> None:
    assert require_names({"a": 1, "b": 2}, {"a", "b"}, "x") == {"a": 1, "b": 2}
    with pytest.raises(CorruptError, match="without b"):
        require_names({"a": 1}, {"a", "b"}, "x")
    with pytest.raises(CorruptError, match="unknown names"):
        require_names({"a": 1, "b": 2, "c": 3}, {"a", "b"}, "x")
    with pytest.raises(CorruptError, match="not a JSON object"):
        require_names([1], {"a"}, "x")
