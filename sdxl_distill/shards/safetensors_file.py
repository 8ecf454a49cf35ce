"""Whole safetensors files of any size, written and read once, in blocks, and hashed on the way.

The library writes from one buffer of all tensors and leaves hashing to a second reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
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
    described = {name: (dtype_of(each), tuple(each.shape)) for name, each in tensors.items()}
    return write_one_by_one(file, described, lambda name: tensors[name], None)


def write_one_by_one(
    file: BinaryIO,
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor_of: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None,
) -> str:
    """Write as `write_safetensors` tensors that are made or read when their turn comes.

    Args:
        file: the file, at its start.
        described: the dtype in safetensors' spelling and the shape of each, by name.
        tensor_of: the function that returns a named tensor; called once for each.
        metadata: the header's metadata; None writes none.

    Returns:
        The SHA-256 of all that was written, hex.

    Raises:
        OSError: when the disk is full or refuses; also whatever `tensor_of` raises.
        ValueError: when a tensor is not as described.
    """
    digest = hashlib.sha256()
    for block in _blocks(described, tensor_of, metadata):
        digest.update(block)
        file.write(block)
    return digest.hexdigest()


def _blocks(
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor_of: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None,
) -> Iterator[bytes | memoryview]:
    header = build_header(described, metadata)
    yield header.content
    for place in header.places:
        tensor = tensor_of(place.name).detach()
        if (dtype_of(tensor), tuple(tensor.shape)) != described[place.name]:
            raise ValueError(f"{place.name} is {tensor.dtype} {list(tensor.shape)}")
        content = byte_view(tensor.cpu().contiguous())
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]
