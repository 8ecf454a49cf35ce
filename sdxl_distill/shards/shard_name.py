"""Names of shards and of the files in them: derived from numbers, never taken from a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sdxl_distill.core.image_id import record_key
from sdxl_distill.limits import MAX_DRAWS, MAX_SIDE_PX

_SET_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHARD: Final = re.compile(r"([1-9]\d*)x([1-9]\d*)(?:-d([1-9]\d*))?-(\d{6})\.(?:tar|idx)", re.ASCII)
_MEMBER: Final = re.compile(r"([0-9a-f]{32})_(\d+x\d+(?:_d\d+)?)\.(safetensors|json)", re.ASCII)


def is_safe_set_id(set_id: str) -> bool:
    """Whether a set may have this name, which its folder gets and its files begin with."""
    return _SET_ID.fullmatch(set_id) is not None


def is_bucket_side(length_px: int) -> bool:
    """Whether a bucket may have this width or height: a multiple of 8 up to 8192 pixels."""
    return 0 < length_px <= MAX_SIDE_PX and length_px % 8 == 0


@dataclass(frozen=True, order=True)
class ShardName:
    """One shard of a set; sorts by bucket, then number, then draw."""

    set_id: str
    width: int
    height: int
    number: int
    draw: int = 0

    def __str__(self) -> str:
        draw = f"-d{self.draw}" if self.draw else ""
        return f"{self.set_id}-{self.width}x{self.height}{draw}-{self.number:06d}"

    @property
    def tar(self) -> str:
        """File name of the tar."""
        return f"{self}.tar"

    @property
    def idx(self) -> str:
        """File name of the index."""
        return f"{self}.idx"

    @classmethod
    def parse(cls, filename: str, set_id: str) -> ShardName | None:
        """Return the shard of `set_id` whose tar or index has this name; None for other files."""
        prefix, rest = filename[: len(set_id) + 1], filename[len(set_id) + 1 :]
        match = _SHARD.fullmatch(rest)
        if prefix != f"{set_id}-" or match is None:
            return None
        width, height, draw, number = (int(digits or 0) for digits in match.groups())
        if not (is_bucket_side(width) and is_bucket_side(height) and draw < MAX_DRAWS):
            return None
        return cls(set_id, width, height, number, draw)

    def key(self, image_id: str) -> str:
        """Return the key of an image's records in this shard's bucket."""
        return record_key(image_id, self.width, self.height)

    def member_stem(self, image_id: str) -> str:
        """Return the name of an image's record in the tar, up to its extension."""
        return self.key(image_id) + (f"_d{self.draw}" if self.draw else "")

    def parse_member(self, member_name: str) -> tuple[str, str] | None:
        """Split a member's name into image id and extension; None when it is not of this shard."""
        match = _MEMBER.fullmatch(member_name)
        if match is None or member_name != f"{self.member_stem(match[1])}.{match[3]}":
            return None
        return match[1], match[3]
