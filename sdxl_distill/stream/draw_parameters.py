"""Draw parameters: the seed and timestep of a draw, and checks that all teachers used them.

Teachers that saw different noise, timesteps or text cannot be averaged. The digests in the
indices prove that they saw the same, without reading a tensor twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from sdxl_distill.core.noise import noise_seed, timestep
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.shards.digest import bytes_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.safetensors_layout import TORCH_DTYPES
from sdxl_distill.shards.set_identity import NoiseRecipe

DRAW_TENSORS: Final = ("seed", "timestep", "noise")
TEXT_TENSORS: Final = ("encoder_hidden_states", "pooled_embeds")
_MAX_TEXT_DISTANCE: Final = 1e-2
"""Largest relative distance between two encodings of one caption: another device's rounding moves
them by less (bfloat16 by 0.8 %), another caption by tens of percent."""


class DrawParameters(NamedTuple):
    """Seed and timestep that follow from an image's id and a draw."""

    seed: int
    timestep: int


def expected_draw(image_id: str, recipe: NoiseRecipe, draw: int) -> DrawParameters:
    """Return the seed and timestep that every teacher must have used."""
    return DrawParameters(
        noise_seed(image_id, recipe.base_seed, draw),
        timestep(image_id, recipe.base_seed, draw, recipe.min_timestep, recipe.max_timestep),
    )


def differing_records(indices: Sequence[ShardIndex], tensor_names: Sequence[str]) -> frozenset[int]:
    """Return the records of aligned shards in which some tensor's digests are not all equal."""
    first, *others = indices
    differs = np.zeros(first.num_records, np.bool_)
    for name in tensor_names:
        for other in others:
            differs |= first.tensor_digests(name) != other.tensor_digests(name)
    return frozenset(np.flatnonzero(differs).tolist())


def require_draw(index: ShardIndex, record: int, parameters: DrawParameters) -> None:
    """Check that a record's stored seed and timestep are the expected ones.

    Raises:
        CorruptError: naming the tensor, the set, the shard and the key.
    """
    for name, value in zip(DrawParameters._fields, parameters, strict=True):
        if index.tensor_digest(name, record) != bytes_digest(value.to_bytes(8, "little")):
            raise CorruptError(
                f"the {name} is not what follows from the image's id",
                expected=f"{name} {value}",
                where=_where(index, record),
                action="rebuild this shard: run its builder with --repair",
            )


def require_noise(index: ShardIndex, record: int, digest: int, origin: str) -> None:
    """Check that a teacher saw the noise that the batch holds.

    Args:
        index: the index of the teacher's shard.
        record: the record's number in the shard.
        digest: the digest of the batch's noise.
        origin: the source of that noise, for the message.

    Raises:
        IncompatibleError: naming the set, the shard and the key.
    """
    if index.tensor_digest("noise", record) != digest:
        raise IncompatibleError(
            "the teacher saw other noise",
            expected=f"the noise of {origin}",
            where=_where(index, record),
            action="rebuild the set with the numpy version of constraints.txt",
        )


def require_close_text(text: ShardReader, other: ShardReader, record: int) -> None:
    """Check that two sets of the same text encoders hold one caption's embeddings.

    Embeddings from different devices may differ by rounding: where digests differ, both are read
    and compared.

    Raises:
        IncompatibleError: naming both sets, the shard and the key.
        CorruptError, StorageError: when they cannot be read.
    """
    for name in TEXT_TENSORS:
        if text.index.tensor_digest(name, record) == other.index.tensor_digest(name, record):
            continue
        expected, found = (_read(reader, record, name) for reader in (text, other))
        distance = torch.linalg.vector_norm(found - expected)
        if not distance <= _MAX_TEXT_DISTANCE * torch.linalg.vector_norm(expected):
            raise IncompatibleError(
                f"{name} are those of another caption",
                expected=f"those of set {text.index.name.set_id}",
                where=_where(other.index, record),
                action="rebuild the set from the captions of today's latents",
            )


def _read(reader: ShardReader, record: int, name: str) -> torch.Tensor:
    place = reader.index.header.place(name)
    out = torch.empty(place.shape, dtype=TORCH_DTYPES[place.dtype])
    reader.read_tensor_into(record, name, out)
    return out.to(torch.float32)


def _where(index: ShardIndex, record: int) -> str:
    name = index.name
    return f"set {name.set_id}, shard {name.tar}, key {index.key(record)}"
