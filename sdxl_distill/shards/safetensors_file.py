"""Whole safetensors files of any size, written and read once, in blocks, and hashed on the way.

The library writes from one buffer of all tensors and leaves hashing to a second reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch

from sdxl_distill.shards.safetensors_layout import build_header, byte_view, dtype_of

BLOCK_BYTES = 16 << 20


def write_safetensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write what `safetensors.torch.save` would, byte for byte, and hash it.

    Holds one tensor in main memory beside those that are there. The blocks are hashed and written
    without the interpreter's lock, so that other threads run on.

    Args:
        file: the file, at its start.
        tensors: its tensors by name, on any device and in any layout.

    Returns:
        The SHA-256 of all that was written, hex.

    Raises:
        OSError: when the disk is full or refuses.
    """
    digest = hashlib.sha256()
    for block in _blocks(tensors):
        digest.update(block)
        file.write(block)
    return digest.hexdigest()


def _blocks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    described = {name: (dtype_of(each), tuple(each.shape)) for name, each in tensors.items()}
    header = build_header(described, None)
    yield header.content
    for place in header.places:
        content = byte_view(tensors[place.name].detach().cpu().contiguous())
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]
