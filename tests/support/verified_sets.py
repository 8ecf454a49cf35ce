"""Sets that are valid in every value, and ways to damage them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdxl_distill.shards.index import ShardIndex, tar_layout
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.fsio import Directory
from support.shard_sets import ShardSets

Change = Mapping[str, Callable[[np.ndarray], np.ndarray]]


@dataclass
class VerifiedSets(ShardSets):
    """As `ShardSets`; latents have plausible time_ids, and may be changed too.

    Attributes:
        latents_change: tensor name → what becomes of its values in the latents set.
    """

    latents_change: Change = field(default_factory=dict)

    def build(self, kind: str) -> Path:
        """Build a set of a kind or layout, and the latents (and text) that it needs."""
        latents = self.latents()
        if kind == "latents":
            return latents
        if kind == "text":
            return self.text()
        if kind == "compact":
            self.text()
        return self.teacher("teacher_a", kind, draws=2)  # type: ignore[arg-type]

    def _write_shard(
        self,
        folder: Directory,
        identity: SetIdentity,
        name: ShardName,
        header: RecordHeader,
        salt: str,
        change: Change | None,
    ) -> ShardIndex:
        if identity.kind == "latents":
            sizes = np.array([2 * name.height, 3 * name.width, 0, 3, name.height, name.width])
            time_ids = {"time_ids": lambda _: sizes.astype(np.int32)}
            change = {**time_ids, **self.latents_change}
        return super()._write_shard(folder, identity, name, header, salt, change)


def flip(path: Path, offset: int) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Take the last byte away."""
    os.truncate(path, path.stat().st_size - 1)


def swap(left: Path, right: Path) -> None:
    """Exchange two files."""
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)


def put_fifo(path: Path) -> None:
    """Replace a file by a named pipe, on which a plain open would hang."""
    path.unlink()
    os.mkfifo(path)


def synthetic_index(name: ShardName, header: RecordHeader, num_records: int = 512) -> ShardIndex:
    """Return an index of records that are nowhere, with ids that no other shard has."""
    generator = np.random.default_rng(name.number)
    numbers = (name.number * num_records + np.arange(num_records)).astype(">u8")
    sidecar_sizes = np.zeros(num_records, np.int64)
    offsets, tar_bytes = tar_layout(header.record_bytes, sidecar_sizes)
    digests = generator.integers(0, 1 << 62, (num_records, len(header.places)), np.uint64)
    return ShardIndex(
        name=name,
        header=header,
        ids=np.pad(numbers.view(np.uint8).reshape(-1, 8), ((0, 0), (8, 0))),
        offsets=offsets,
        sizes=np.full(num_records, header.record_bytes, np.int64),
        sidecar_sizes=sidecar_sizes,
        digests=digests,
        rest_digests=digests[:, 0].copy(),
        noise_digests=digests[:, 1].copy() if header.recreates_noise else None,
        tar_bytes=tar_bytes,
        tar_sha256=f"{name.number:064x}",
    )
