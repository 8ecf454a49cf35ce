"""Megatron-Energon: the shards themselves, joined by key through a metadataset."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from megatron.energon import (
    CrudeSample,
    Sample,
    WorkerConfig,
    edataclass,
    get_loader,
    get_val_dataset,
    prepare_metadataset,
)
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory
from peer import Batch, batches, joined, require_same_key, serve, set_folders


@edataclass
class JoinedSample(Sample):
    """The bytes of one image's records: of the latents set, then of each teacher."""

    contents: tuple[bytes, ...]


def join_samples(*samples: CrudeSample) -> JoinedSample:
    """Put the samples of one key together; the metadataset names this function."""
    key = require_same_key(sample["__key__"].rpartition("/")[2] for sample in samples)
    return JoinedSample(
        __key__=key,
        __restore_key__=(),
        __subflavors__=None,
        contents=tuple(sample["safetensors"] for sample in samples),
    )


def prepare(root: Path, own: Path) -> Callable[[], Iterator[Batch]]:
    """Index links to the tars of every set, and write the join."""
    folders = [_index(folder, own / folder.name) for folder in set_folders(root)]
    metadataset = own / "joined.yaml"
    joiner = {"__module__": "energon", "__function__": "join_samples"}
    splits = {"train": {"join": [{"path": folder.name} for folder in folders], "joiner": joiner}}
    _write_yaml(
        metadataset,
        {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits},
    )
    prepare_metadataset(EPath(metadataset))
    dataset = get_val_dataset(
        metadataset,
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
    )
    loader = get_loader(dataset)

    def epoch() -> Iterator[Batch]:
        return batches((sample.__key__, _parse(*sample.contents)) for sample in loader)

    return epoch


def _index(source: Path, target: Path) -> Path:
    target.mkdir()
    tars = [tar.name for tar in sorted(source.glob("*.tar"))]
    for name in tars:
        os.link(source / name, target / name)
    BaseWebdatasetFactory.prepare_dataset(
        target, tars, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    _write_yaml(target / ".nv-meta" / "dataset.yaml", crude)
    return target


def _parse(latents: bytes, *teachers: bytes) -> dict:
    load = safetensors.torch.load
    return joined(load(latents), map(load, teachers))


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content), "utf-8")


if __name__ == "__main__":
    serve(prepare)
