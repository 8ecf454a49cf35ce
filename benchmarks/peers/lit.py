"""LitData: one optimized dataset for each set, walked side by side."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from litdata.streaming.dataset import StreamingDataset
from litdata.streaming.writer import BinaryWriter
from peer import Batch, batches, joined, records, require_same_key, serve, set_folders


def prepare(root: Path, own: Path) -> Callable[[], Iterator[Batch]]:
    """Write chunks of 64 MB for each set."""
    folders = [_convert(folder, own / folder.name) for folder in set_folders(root)]
    datasets = [StreamingDataset(str(folder), shuffle=False) for folder in folders]

    def epoch() -> Iterator[Batch]:
        return batches(
            (
                require_same_key(sample["key"] for sample in samples),
                joined(samples[0], samples[1:]),
            )
            for samples in zip(*datasets, strict=True)
        )

    return epoch


def _convert(source: Path, target: Path) -> Path:
    target.mkdir()
    writer = BinaryWriter(str(target), chunk_bytes="64MB")
    for number, (key, record) in enumerate(records(source)):
        writer.add_item(number, {"key": key, **record})
    writer.done()
    writer.merge(1)
    return target


if __name__ == "__main__":
    serve(prepare)
