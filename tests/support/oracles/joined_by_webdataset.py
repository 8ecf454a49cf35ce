"""The join as anybody would write it with webdataset and safetensors: read all, look up by key."""

from __future__ import annotations

import gc
import warnings
from functools import lru_cache
from pathlib import Path

import torch
import webdataset
from safetensors.torch import load

Records = dict[str, dict[str, torch.Tensor]]


@lru_cache
def read_all(directory: Path) -> Records:
    """Return every record of a set by its name in the tar, `{key}` or `{key}_d{draw}`."""
    urls = [str(tar) for tar in sorted(directory.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        samples = webdataset.WebDataset(urls, shardshuffle=False)
        records = {sample["__key__"]: load(sample["safetensors"]) for sample in samples}
        del samples
        gc.collect()
    return records


def record_name(key: str, draw: int) -> str:
    return f"{key}_d{draw}" if draw else key
