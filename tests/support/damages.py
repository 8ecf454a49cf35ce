"""What can happen to a committed shard."""

from __future__ import annotations

import os
from pathlib import Path


def flip_a_byte_of_the_tar(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)


def cut_the_tar(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size - 512)


def flip_a_byte_of_the_index(tar: Path) -> None:
    content = bytearray(tar.with_suffix(".idx").read_bytes())
    content[-1] ^= 1
    tar.with_suffix(".idx").write_bytes(content)


def delete_the_tar(tar: Path) -> None:
    tar.unlink()


def delete_the_index(tar: Path) -> None:
    tar.with_suffix(".idx").unlink()


def put_a_fifo_in_place_of_the_tar(tar: Path) -> None:
    tar.unlink()
    os.mkfifo(tar)


def put_the_next_shard_in_its_place(tar: Path) -> None:
    other = sorted(tar.parent.glob("*.tar"))[1]
    for suffix in (".tar", ".idx"):
        tar.with_suffix(suffix).write_bytes(other.with_suffix(suffix).read_bytes())


DAMAGES = (
    flip_a_byte_of_the_tar,
    cut_the_tar,
    flip_a_byte_of_the_index,
    delete_the_tar,
    delete_the_index,
    put_a_fifo_in_place_of_the_tar,
    put_the_next_shard_in_its_place,
)
