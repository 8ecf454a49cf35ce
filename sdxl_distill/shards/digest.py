"""64-bit xxh3 digests of the parts of a record; they find damage, SHA-256 proves identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import xxhash

from sdxl_distill.shards.safetensors_layout import AnyTensor, byte_view

bytes_digest: Final[Callable[[bytes | memoryview], int]] = xxhash.xxh3_64_intdigest
"""The 64-bit xxh3 of some bytes; releases the GIL."""


def tensor_digest(tensor: AnyTensor) -> int:
    """Return the digest of a contiguous array or CPU tensor as an index holds it."""
    return bytes_digest(byte_view(tensor))


def rest_digest(header: bytes, sidecar: bytes) -> int:
    """Return the digest of all of a record that is not a tensor: its header, then its sidecar."""
    state = xxhash.xxh3_64(header)
    state.update(sidecar)
    return state.intdigest()
