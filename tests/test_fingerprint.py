"""Canonical JSON and what differs between two configurations."""

from __future__ import annotations

import hashlib

import pytest

from sdxl_distill.fingerprint import canonical_json, differing_fields, fingerprint


def test_equal_values_have_equal_bytes() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == b'{"a":"\\u00fc","b":[1,2.5]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": number})


def test_differences_are_named_by_path() -> None:
    found = {"cache": {"base_seed": 42, "draws": 1}, "version": "1"}
    expected = {"cache": {"base_seed": 43, "draws": 1}, "kind": "latents", "version": "1"}
    assert differing_fields(found, expected) == [
        ("cache.base_seed", 42, 43),
        ("kind", None, "latents"),
    ]
