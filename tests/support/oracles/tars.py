"""Shards read by plain webdataset and safetensors, as anybody would."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset
from safetensors.torch import load


class Record(NamedTuple):
    """One record: its tensors, the metadata of its header, and the JSON beside it, if any."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    sidecar: dict[str, Any]
    tar: str


def read_tars(tars: Iterable[Path]) -> dict[str, Record]:
    """Return all records by their name in the tar: the key, with `_d{k}` for draw k."""
    urls = [str(tar) for tar in sorted(tars)]
    records: dict[str, Record] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        for fields in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            content = fields["safetensors"]
            assert fields["__key__"] not in records
            records[fields["__key__"]] = Record(
                load(content),
                _metadata(content),
                json.loads(fields.get("json", b"{}")),
                Path(fields["__url__"]).name,
            )
        gc.collect()
    return records


def read_set(directory: Path) -> dict[str, Record]:
    """Return all records of a set by name."""
    return read_tars(directory.glob("*.tar"))


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]
