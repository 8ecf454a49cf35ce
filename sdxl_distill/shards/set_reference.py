"""A reference from one shard set to another: by fingerprint, with a place as a mere hint.

The place comes from a file and may be hostile: it is relative, climbs at most three folders, and
what lies there counts only when its fingerprint is the one referred to.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.bounded_json import require_names

_MAX_LEADING_PARENTS: Final = 3
_MAX_PARTS: Final = 32
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Of the halves of surrogate pairs only those count that stand for a byte of no UTF-8 (PEP 383).
_SAFE_PART: Final = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]{1,255}")


@dataclass(frozen=True)
class SetReference:
    """Another set that this one was made from, and where it lay as seen from this one.

    Attributes:
        fingerprint: of that set.
        place: relative path with `/`, at most three leading `..`; None when there is no such
            path. A hint: it is outside the fingerprint, and what lies there must match.
    """

    fingerprint: str
    place: str | None = None

    @classmethod
    def between(cls, target_fingerprint: str, directory: Path, target: Path) -> SetReference:
        """Refer to the set in folder `target` from the set in folder `directory`."""
        # Not Path.resolve: what is there may be a link onto itself, which opening it will say.
        places = os.path.realpath(target), os.path.realpath(directory)
        relative = PurePosixPath(os.path.relpath(*places))
        place = str(relative)
        return cls(target_fingerprint, place if is_safe_place(place) else None)

    def resolve(self, directory: Path) -> Path | None:
        """Return the folder referred to by the set in `directory`."""
        return None if self.place is None else directory / self.place


def parse_reference(value: Any, where: str) -> SetReference | None:
    """Read a reference that may come from a stranger; None stays None.

    Raises:
        CorruptError: when its fields are not a fingerprint and a safe place.
    """
    if value is None:
        return None
    fields = require_names(value, {"fingerprint", "place"}, where)
    place = fields["place"]
    is_safe = place is None or (isinstance(place, str) and is_safe_place(place))
    if not is_sha256(fields["fingerprint"]) or not is_safe:
        raise CorruptError(
            "a reference to another set that is not safe",
            expected="a fingerprint, and a relative place with at most three leading ..",
            where=where,
        )
    return SetReference(**fields)


def is_safe_place(place: str) -> bool:
    """Whether a relative path climbs at most three folders and then only descends."""
    parts = place.split("/")
    num_parents = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    names = parts[num_parents:]
    return (
        num_parents <= _MAX_LEADING_PARENTS
        and len(names) <= _MAX_PARTS
        and all(_SAFE_PART.fullmatch(name) for name in names)
    )


def is_sha256(value: Any) -> bool:
    """Whether a JSON value is 64 hex digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
