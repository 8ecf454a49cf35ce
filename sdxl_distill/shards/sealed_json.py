"""JSON files that prove their own integrity: canonical bytes that hold their digest."""

from __future__ import annotations

from typing import Any, Final, cast

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import canonical_json, fingerprint
from sdxl_distill.shards.bounded_json import parse_json

FORMAT_VERSION: Final = 1
_DIGEST: Final = "digest"


def seal(fields: dict[str, Any]) -> bytes:
    """Return the canonical JSON of `fields` and of `digest`, the SHA-256 of the same without it."""
    return canonical_json({**fields, _DIGEST: fingerprint(fields)})


def unseal(content: bytes, where: str, max_bytes: int) -> dict[str, Any]:
    """Return the fields of what `seal` wrote, the digest left out.

    Raises:
        CorruptError: when it is too large, no JSON object, not in canonical form, or not what
            its digest says.
        IncompatibleError: when `format_version` is greater than ours.
    """
    value = parse_json(content, where, max_bytes)
    if not isinstance(value, dict):
        raise CorruptError("no JSON object", expected="an object", where=where)
    fields = cast("dict[str, Any]", value)
    fields.pop(_DIGEST, None)
    if seal(fields) != content:
        raise CorruptError(
            "bytes that are not what the digest in them says",
            expected="the file as it was written",
            where=where,
            action="copy the set anew, or rebuild it by its builder with --repair",
        )
    version = fields.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise IncompatibleError(
            f"format version {version}",
            expected=f"at most {FORMAT_VERSION}",
            where=where,
            action="install a newer sdxl_distill",
        )
    return fields
