"""Canonical JSON and its SHA-256: the identity of anything that determines content."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Encode `value` so that equal values give equal bytes.

    Keys sorted, no white space, ASCII only, floats as their shortest round-trip form.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value` as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def differing_fields(
    found: dict[str, Any], expected: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """List `(dotted path, found, expected)` of every leaf in which two mappings differ."""
    differences: list[tuple[str, Any, Any]] = []
    for name in sorted(found.keys() | expected.keys()):
        left, right = found.get(name), expected.get(name)
        path = f"{prefix}{name}"
        if isinstance(left, dict) and isinstance(right, dict):
            differences += differing_fields(left, right, f"{path}.")
        elif left != right:
            differences.append((path, left, right))
    return differences
