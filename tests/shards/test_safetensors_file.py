"""Safetensors files in blocks: the library's own bytes, hashed on the way."""

from __future__ import annotations

import hashlib
import io

import pytest
import torch
from safetensors.torch import save

from sdxl_distill.shards import safetensors_file
from sdxl_distill.shards.safetensors_file import write_safetensors

TENSORS = {
    "b": torch.arange(7, dtype=torch.int16),
    "a": torch.arange(12.0).view(3, 4).to(torch.bfloat16),
    "codes": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(3, dtype=torch.float16),
    "scalar": torch.tensor(1.5),
    "none": torch.zeros(0, 4),
    "ün": torch.tensor([1, 2], dtype=torch.int64),
    "turned": torch.arange(6.0).view(2, 3).T,
}


@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
def test_the_bytes_are_the_librarys(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", block_bytes)
    file = io.BytesIO()
    digest = write_safetensors(file, TENSORS)
    content = file.getvalue()
    assert content == save({name: each.contiguous() for name, each in TENSORS.items()})
    assert digest == hashlib.sha256(content).hexdigest()
