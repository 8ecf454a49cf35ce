"""MosaicML streaming: one MDS dataset for each set, walked side by side.

`streaming` imports torchvision, which no PyPI build of this torch has: only `streaming.base` is
imported, which is all that is used.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peer import (
    BATCH,
    Batch,
    Record,
    batches,
    joined,
    records,
    require_same_key,
    serve,
    set_folders,
)

_package = types.ModuleType("streaming")
_spec = importlib.util.find_spec("streaming")
assert _spec is not None
_package.__path__ = list(_spec.submodule_search_locations or [])
sys.modules["streaming"] = _package

from streaming.base import MDSWriter, StreamingDataset  # noqa: E402


def prepare(root: Path, own: Path) -> Callable[[], Iterator[Batch]]:
    """Write an MDS dataset for each set."""
    datasets = [_convert(folder, own / folder.name) for folder in set_folders(root)]

    def epoch() -> Iterator[Batch]:
        return batches(
            (
                require_same_key(sample["key"] for sample in samples),
                joined(_tensors(samples[0]), map(_tensors, samples[1:])),
            )
            for samples in zip(*datasets, strict=True)
        )

    return epoch


def _convert(source: Path, target: Path) -> StreamingDataset:
    _, first = next(iter(records(source)))
    columns = {"key": "str"}
    for name, tensor in first.items():
        shape = ",".join(map(str, tensor.shape))
        columns[name] = f"ndarray:{str(tensor.dtype).removeprefix('torch.')}:{shape}"
    with MDSWriter(out=str(target), columns=columns) as writer:
        for key, record in records(source):
            row = {name: tensor.numpy() for name, tensor in record.items()}
            writer.write({"key": key, **row})
    return StreamingDataset(local=str(target), shuffle=False, batch_size=BATCH)


def _tensors(sample: dict) -> Record:
    return {name: torch.from_numpy(value) for name, value in sample.items() if name != "key"}


if __name__ == "__main__":
    serve(prepare)
