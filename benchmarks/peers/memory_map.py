"""A memory-mapped file: every tensor of every image, joined beforehand, at a fixed stride."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from peer import BATCH, Batch, Record, joined, records, serve, set_folders


def prepare(root: Path, own: Path) -> Callable[[], Iterator[Batch]]:
    """Write one file for all sets; another teacher means writing it anew."""
    keys: list[str] = []
    path = own / "records"
    row: Record = {}
    with path.open("wb") as file:
        for parts in zip(*(records(folder) for folder in set_folders(root)), strict=True):
            (key, latents), *teachers = parts
            row = joined(latents, [record for _, record in teachers])
            keys.append(key)
            for tensor in row.values():
                file.write(tensor.numpy().tobytes())
    fields = [(name, tensor.numpy().dtype, tuple(tensor.shape)) for name, tensor in row.items()]
    mapped = np.memmap(path, np.dtype(fields), "r")

    def epoch() -> Iterator[Batch]:
        for start in range(0, len(keys), BATCH):
            rows = mapped[start : start + BATCH]
            yield (
                keys[start : start + BATCH],
                {name: torch.from_numpy(np.array(rows[name])) for name in row},
            )

    return epoch


if __name__ == "__main__":
    serve(prepare)
