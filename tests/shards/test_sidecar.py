"""Captions of a sidecar: a list of text, or an error that says what was expected."""

from __future__ import annotations

import json

import pytest

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.sidecar import parse_captions


@pytest.mark.parametrize("captions", [["a cat"], ["a cat", "", "Müller"]])
def test_captions_are_read_in_their_order(captions: list[str]) -> None:
    content = json.dumps({"captions": captions, "source": "of another tool"}).encode()
    assert parse_captions(content, "rebuild") == captions


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"captions":[]}',
        b'{"captions":"a cat"}',
        b'{"captions":{"a cat":1}}',
        b'{"captions":[7]}',
        b'{"captions":["\\ud800"]}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda content: str(content[:30]),
)
def test_a_sidecar_without_a_list_of_texts_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptError, match="set s, key k.*no captions"):
        parse_captions(content, "rebuild", "set s, key k")
