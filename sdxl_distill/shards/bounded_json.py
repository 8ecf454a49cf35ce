"""Reads JSON that may come from a stranger: bounded in size and depth, one meaning only.

Values come out as plain dicts, lists, strings, numbers; what they should be is for the caller to
check. An error repeats nothing of the text but what `shown` returns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeAlias, cast

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.fingerprint import canonical_json, fingerprint
from sdxl_distill.limits import MAX_JSON_DEPTH

_CONTAINERS: Final = (dict, list)
_MAX_SHOWN: Final = 80

Legal: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]
"""For each field its check, and what the check expects, for messages."""


def parse_json(content: bytes, where: str, max_bytes: int) -> Any:
    """Parse UTF-8 JSON of at most `max_bytes` and at most 8 nested containers.

    Raises:
        CorruptError: for anything else, for a name given twice in one object, NaN and infinities.
    """
    if len(content) > max_bytes:
        raise CorruptError(
            f"{len(content)} bytes of JSON", expected=f"at most {max_bytes}", where=where
        )
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_names,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        reason = error.args[0] if isinstance(error, _AmbiguousJsonError) else "cannot be parsed"
        raise CorruptError(f"the JSON {reason}", expected="valid JSON", where=where) from error
    if not _is_shallow(value, MAX_JSON_DEPTH):
        raise CorruptError(
            "the JSON is nested too deeply",
            expected=f"at most {MAX_JSON_DEPTH} levels",
            where=where,
        )
    return value


def require_names(value: Any, names: set[str], where: str) -> dict[str, Any]:
    """Return `value` as an object that has exactly these names.

    Raises:
        CorruptError: when it is not an object, lacks one of them or has another.
    """
    if not isinstance(value, dict):
        raise CorruptError("not a JSON object", expected="an object", where=where)
    fields = cast("dict[str, Any]", value)
    if fields.keys() != names:
        missing = sorted(names - fields.keys())
        found = f"without {', '.join(missing)}" if missing else "an object with unknown names"
        raise CorruptError(found, expected=", ".join(sorted(names)), where=where)
    return fields


def require_legal(fields: Mapping[str, Any], legal: Legal, where: str, prefix: str = "") -> None:
    """Refuse the first field whose value is not legal.

    Args:
        fields: an object that may come from a stranger; it has all the names in `legal`.
        legal: the check of each field.
        where: the file, for messages.
        prefix: the path of the object in the file, for messages: `noise.`, say.

    Raises:
        CorruptError: naming the field, its value and the expected one.
    """
    for name, (is_legal, expected) in legal.items():
        if not is_legal(fields[name]):
            raise CorruptError(
                f"{prefix}{name} is {shown(fields[name])}", expected=expected, where=where
            )


def shown(value: Any) -> str:
    """Return what a message repeats of a stranger's value: 80 characters of its `repr`."""
    return repr(value)[:_MAX_SHOWN]


class _AmbiguousJsonError(ValueError):
    """Text that parsers read in different ways."""


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _AmbiguousJsonError("has a name twice in one object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise _AmbiguousJsonError(f"has the value {name}")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _AmbiguousJsonError("has a number that is too large")
    return value


def _is_shallow(value: Any, num_levels: int) -> bool:
    if isinstance(value, dict):
        children: list[Any] = list(cast("dict[str, Any]", value).values())
    elif isinstance(value, list):
        children = cast("list[Any]", value)
    else:
        return True
    if num_levels == 0:
        return False
    return all(
        _is_shallow(child, num_levels - 1) for child in children if type(child) in _CONTAINERS
    )


SET_FORMAT_VERSION: Final = 1
_DIGEST: Final = "digest"


def seal(fields: dict[str, Any]) -> bytes:
    """Return the canonical JSON of `fields` and of `digest`, the SHA-256 of the same without it."""
    return canonical_json({**fields, _DIGEST: fingerprint(fields)})


def unseal(content: bytes, where: str, max_bytes: int) -> dict[str, Any]:
    """Return the fields of what `seal` wrote, the digest left out.

    Raises:
        CorruptError: when it is too large, not a JSON object, not in canonical form, or does not
            match its digest.
        IncompatibleError: when `format_version` is greater than ours.
    """
    value = parse_json(content, where, max_bytes)
    if not isinstance(value, dict):
        raise CorruptError("not a JSON object", expected="an object", where=where)
    fields = cast("dict[str, Any]", value)
    fields.pop(_DIGEST, None)
    if seal(fields) != content:
        raise CorruptError(
            "the bytes do not match the digest in them",
            expected="the file as it was written",
            where=where,
            action="copy the set again, or rebuild it by its builder with --repair",
        )
    version = fields.get("format_version")
    if type(version) is int and version > SET_FORMAT_VERSION:
        raise IncompatibleError(
            f"format version {version}",
            expected=f"at most {SET_FORMAT_VERSION}",
            where=where,
            action="install a newer sdxl_distill",
        )
    return fields
