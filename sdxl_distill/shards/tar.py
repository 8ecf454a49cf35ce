"""The one kind of tar that shards are: plain USTAR in which every byte but the payloads is fixed.

The strict reader builds the header that a member of that name and size must have and compares
all 512 bytes, so that no field can lie (docs/format.md says what tarfile lets pass).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from sdxl_distill.errors import CorruptError
from sdxl_distill.storage.random_access import RandomAccess
from sdxl_distill.storage.regular_file import storage_errors

OWNER: Final = "sdxl_distill"
MODE: Final = 0o444
BLOCK_BYTES: Final = 512
_RECORD_BYTES: Final = 20 * BLOCK_BYTES  # tar files are padded to a multiple of this
_PIECE_BYTES: Final = 2 << 20
_ZEROS: Final = bytes(2 * BLOCK_BYTES + _RECORD_BYTES)  # the longest stretch between two members
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


def read_fully(file: RandomAccess, buffer: memoryview, offset: int, where: str) -> None:
    """Fill `buffer` from a file at `offset`, without a copy and without the GIL.

    Raises:
        CorruptError: when the file ends too early.
        StorageError: when the operating system refuses.
    """
    with storage_errors(where):
        num_read = file.read_into([buffer], offset)
        while 0 < num_read < len(buffer):
            more = file.read_into([buffer[num_read:]], offset + num_read)
            if more == 0:
                break
            num_read += more
    if num_read < len(buffer):
        raise _ends(offset + num_read, offset + len(buffer), where)


def read_at(file: RandomAccess, num_bytes: int, offset: int, where: str) -> bytearray:
    """Return bytes of a file; raises as `read_fully`."""
    buffer = bytearray(num_bytes)
    read_fully(file, memoryview(buffer), offset, where)
    return buffer


class TarStream:
    """A tar that is read once, from start to end, in large pieces that are hashed on the way.

    Bytes stay in memory until `forget`, so that a member can be looked at after it is known which
    one follows it.

    Args:
        file: the tar.
        where: the tar's name, for messages.
    """

    def __init__(self, file: RandomAccess, where: str) -> None:
        self._file = file
        self._num_bytes = num_bytes = file.num_bytes
        self._where = where
        self._sha256 = hashlib.sha256()
        self._buffer = memoryview(bytearray(min(_PIECE_BYTES, num_bytes)))
        # The buffer has bytes _begin … _end - 1 of the tar; those before _kept are not needed.
        self._begin = self._kept = self._end = 0

    def members(self) -> Iterator[TarMember]:
        """Yield the members, checked as `read_members` does; nothing is forgotten on the way."""
        return _members(self.read, self._num_bytes, self._where)

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return bytes that were not forgotten; they are valid until the next call.

        Raises:
            CorruptError, StorageError: as `read_fully`.
        """
        assert offset >= self._kept, (offset, self._kept)
        end = offset + num_bytes
        if end > self._num_bytes:
            raise _ends(self._num_bytes, end, self._where)
        if end > self._end:
            self._load(end)
        return self._buffer[offset - self._begin : end - self._begin]

    def forget(self, offset: int) -> None:
        """Give up the bytes before `offset`."""
        self._kept = offset

    def sha256(self) -> str:
        """Return the SHA-256 of the tar, all of whose members were read."""
        assert self._end == self._num_bytes, (self._end, self._num_bytes)
        return self._sha256.hexdigest()

    def _load(self, end: int) -> None:
        """Read on, at least to `end` and as far as there is room."""
        num_kept = self._end - self._kept
        # Make room: move what is still needed to the start, in a larger buffer if need be.
        if end - self._begin > len(self._buffer):
            kept = self._buffer[self._kept - self._begin : self._end - self._begin]
            if end - self._kept > len(self._buffer):
                self._buffer = memoryview(bytearray(end - self._kept + _PIECE_BYTES))
            self._buffer[:num_kept] = kept
            self._begin = self._kept
        # Fill the rest of the buffer.
        start = self._end - self._begin
        piece = self._buffer[start : start + self._num_bytes - self._end]
        read_fully(self._file, piece, self._end, self._where)
        self._sha256.update(piece)
        self._end += len(piece)


def read_members(file: RandomAccess, where: str) -> Iterator[TarMember]:
    """Yield the members of a tar, checking every byte that is not payload; payloads are not read.

    Raises:
        CorruptError: at the first byte that differs from what `webdataset.TarWriter` writes with
            our settings, or when the tar ends too early or too late.
    """

    def read(offset: int, num_bytes: int) -> bytearray:
        return read_at(file, num_bytes, offset, where)

    return _members(read, file.num_bytes, where)


def _members(
    read: Callable[[int, int], bytearray | memoryview], num_bytes: int, where: str
) -> Iterator[TarMember]:
    position = 0
    while True:
        header = bytes(read(position, BLOCK_BYTES))
        if header == _ZEROS[:BLOCK_BYTES]:
            break
        member = _parse_header(header, position, where)
        end = member.offset + member.num_bytes
        position = member.offset + padded(member.num_bytes)
        if position > num_bytes:
            raise _corrupt(f"member {member.name} is longer than the tar", position, where)
        yield member
        if bytes(read(end, position - end)) != _ZEROS[: position - end]:
            raise _corrupt("padding that is not zero", end, where)
    if num_bytes != closed_bytes(position):
        raise _corrupt(f"{num_bytes} bytes, expected {closed_bytes(position)}", position, where)
    if bytes(read(position, num_bytes - position)) != _ZEROS[: num_bytes - position]:
        raise _corrupt("data after the last member", position, where)


def _ends(offset: int, expected: int, where: str) -> CorruptError:
    return CorruptError(
        f"the file ends at byte {offset}",
        expected=f"bytes up to {expected}",
        where=where,
        action=_ACTION,
    )


def _parse_header(header: bytes, position: int, where: str) -> TarMember:
    name = header[:_MAX_NAME_BYTES].rstrip(b"\0")
    size = header[_SIZE_FIELD]
    if not name.isascii() or not _OCTAL_SIZE.fullmatch(size):
        raise _corrupt("not a tar header", position, where)
    member = TarMember(name.decode("ascii"), position + BLOCK_BYTES, int(size[:-1], 8))
    if header != member_header(member.name, member.num_bytes):
        raise _corrupt("a tar header with unexpected fields", position, where)
    return member


def _corrupt(found: str, position: int, where: str) -> CorruptError:
    return CorruptError(f"{found} at byte {position}", where=where, action=_ACTION)
