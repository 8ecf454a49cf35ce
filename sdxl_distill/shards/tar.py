"""The one kind of tar that shards are: plain USTAR in which every byte but the payloads is fixed.

The strict reader builds the header that a member of that name and size must have and compares
all 512 bytes, so that no field can lie (docs/format.md says what tarfile lets pass).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from sdxl_distill.errors import CorruptError
from sdxl_distill.fsio import storage_errors

OWNER: Final = "sdxl_distill"
MODE: Final = 0o444
BLOCK_BYTES: Final = 512
_RECORD_BYTES: Final = 20 * BLOCK_BYTES  # tar files are padded to a multiple of this
_PIECE_BYTES: Final = 1 << 20
_MAX_NAME_BYTES: Final = 100
_OCTAL_SIZE: Final = re.compile(rb"[0-7]{11}\0")
_SIZE_FIELD: Final = slice(124, 136)
_ACTION: Final = "the shard is damaged: rebuild it by its builder with --repair"


class TarMember(NamedTuple):
    """A file in a tar: its payload is bytes `offset` … `offset + num_bytes`."""

    name: str
    offset: int
    num_bytes: int


def padded(num_bytes: int) -> int:
    """Return the room that a payload takes in a tar."""
    return num_bytes + -num_bytes % BLOCK_BYTES


def closed_bytes(end_of_members: int) -> int:
    """Return the size of a tar whose last member ends there: two zero blocks, then padding."""
    end = end_of_members + 2 * BLOCK_BYTES
    return end + -end % _RECORD_BYTES


def member_header(name: str, num_bytes: int) -> bytes:
    """Return the 512 bytes in front of a member (POSIX.1-1988, "ustar")."""
    fields = b"".join(
        (
            name.encode("ascii").ljust(_MAX_NAME_BYTES, b"\0"),
            b"%07o\0%07o\0%07o\0" % (MODE, 0, 0),  # mode, uid, gid
            b"%011o\0" % num_bytes,
            b"%011o\0" % 0,  # mtime
            b" " * 8,  # the checksum counts itself as spaces
            b"0".ljust(1 + _MAX_NAME_BYTES, b"\0"),  # regular file, no link
            b"ustar\x0000",
            OWNER.encode("ascii").ljust(32, b"\0") * 2,
        )
    ).ljust(BLOCK_BYTES, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def read_at(descriptor: int, buffer: memoryview, offset: int, where: str) -> None:
    """Fill `buffer` from a file at `offset`, without a copy and without the GIL.

    Raises:
        CorruptError: when the file ends before.
        StorageError: when the operating system refuses.
    """
    with storage_errors(where):
        num_read = os.preadv(descriptor, [buffer], offset)
        while 0 < num_read < len(buffer):
            more = os.preadv(descriptor, [buffer[num_read:]], offset + num_read)
            if more == 0:
                break
            num_read += more
    if num_read < len(buffer):
        raise CorruptError(
            f"the file ends at byte {offset + num_read}",
            expected=f"bytes up to {offset + len(buffer)}",
            where=where,
            action=_ACTION,
        )


def read_members(descriptor: int, num_bytes: int, where: str) -> Iterator[TarMember]:
    """Yield the members of a tar of `num_bytes`, checking every byte that is no payload.

    Raises:
        CorruptError: at the first byte that is not as `webdataset.TarWriter` with our settings
            writes it, or when the tar ends too early or too late.
    """
    position = 0
    while True:
        header = _read(descriptor, position, BLOCK_BYTES, where)
        if not any(header):
            break
        member = _parse_header(header, position, where)
        end = member.offset + member.num_bytes
        position = member.offset + padded(member.num_bytes)
        if position > num_bytes:
            raise _corrupt(f"member {member.name} is longer than the tar", position, where)
        yield member
        if any(_read(descriptor, end, position - end, where)):
            raise _corrupt("padding that is not zero", end, where)
    if num_bytes != closed_bytes(position):
        raise _corrupt(f"{num_bytes} bytes, expected {closed_bytes(position)}", position, where)
    if any(_read(descriptor, position, num_bytes - position, where)):
        raise _corrupt("something after the last member", position, where)


def sha256_of(descriptor: int, num_bytes: int, where: str) -> str:
    """Return the SHA-256 of a file of `num_bytes`, read piece by piece.

    Raises:
        CorruptError, StorageError: as `read_at`.
    """
    state = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE_BYTES))
    for offset in range(0, num_bytes, _PIECE_BYTES):
        part = piece[: num_bytes - offset]
        read_at(descriptor, part, offset, where)
        state.update(part)
    return state.hexdigest()


def _read(descriptor: int, offset: int, num_bytes: int, where: str) -> bytearray:
    buffer = bytearray(num_bytes)
    read_at(descriptor, memoryview(buffer), offset, where)
    return buffer


def _parse_header(header: bytearray, position: int, where: str) -> TarMember:
    name = bytes(header[:_MAX_NAME_BYTES]).rstrip(b"\0")
    size = bytes(header[_SIZE_FIELD])
    if not name.isascii() or not _OCTAL_SIZE.fullmatch(size):
        raise _corrupt("no tar header", position, where)
    member = TarMember(name.decode("ascii"), position + BLOCK_BYTES, int(size[:-1], 8))
    if bytes(header) != member_header(member.name, member.num_bytes):
        raise _corrupt("a tar header with unexpected fields", position, where)
    return member


def _corrupt(found: str, position: int, where: str) -> CorruptError:
    return CorruptError(f"{found} at byte {position}", where=where, action=_ACTION)
