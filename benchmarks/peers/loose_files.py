"""Loose files: one safetensors file per record and set, a map-style dataset, a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
from peer import BATCH, Batch, Record, joined, records, serve, set_folders
from torch.utils.data import DataLoader, Dataset, default_collate

NUM_WORKERS = 0


class LooseRecords(Dataset[tuple[str, Record]]):
    """Joins by file name; the folders of all sets hold the same names."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._names = sorted(path.name for path in folders[0].iterdir())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: int) -> tuple[str, Record]:
        name = self._names[row]
        latents, *teachers = (
            safetensors.torch.load_file(folder / name) for folder in self._folders
        )
        return name.removesuffix(".safetensors"), joined(latents, teachers)


def prepare(root: Path, own: Path) -> Callable[[], Iterator[Batch]]:
    """Write each record of each set to a file."""
    folders: list[Path] = []
    for source in set_folders(root):
        folder = own / source.name
        folder.mkdir()
        for key, record in records(source):
            safetensors.torch.save_file(record, folder / f"{key}.safetensors")
        folders.append(folder)
    loader = DataLoader(
        LooseRecords(folders),
        batch_size=BATCH,
        num_workers=NUM_WORKERS,
        persistent_workers=NUM_WORKERS > 0,
        collate_fn=default_collate,
    )
    return lambda: iter(loader)


if __name__ == "__main__":
    serve(prepare)
