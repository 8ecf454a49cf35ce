"""webdataset: one reader for each set, zipped; safetensors parses each record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
from peer import Batch, batches, joined, require_same_key, serve, set_folders
from webdataset.compat import WebDataset


def prepare(root: Path, own: Path) -> Callable[[], Iterator[Batch]]:
    """Nothing to convert: the shards are what webdataset reads."""
    own.rmdir()
    urls = [[str(tar) for tar in sorted(path.glob("*.tar"))] for path in set_folders(root)]

    def epoch() -> Iterator[Batch]:
        readers = [WebDataset(tars, shardshuffle=False) for tars in urls]
        return batches(
            (
                require_same_key(sample["__key__"] for sample in samples),
                joined(*_parse([sample["safetensors"] for sample in samples])),
            )
            for samples in zip(*readers, strict=True)
        )

    return epoch


def _parse(contents: list[bytes]) -> tuple[dict, list[dict]]:
    latents, *teachers = (safetensors.torch.load(content) for content in contents)
    return latents, teachers


if __name__ == "__main__":
    serve(prepare)
