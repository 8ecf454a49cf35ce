"""Checks the values in a record, where digests only prove that its bytes are unchanged.

Noise, seed and timestep follow from the image's id and are computed again; the rest has to be
finite and plausible. What a tensor is follows from its name (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from sdxl_distill.core.bucket import Bucket, cover_crop
from sdxl_distill.core.noise import noise, noise_seed, timestep
from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.safetensors_layout import byte_view
from sdxl_distill.shards.set_identity import NoiseRecipe

_MAX_SEED = 1 << 32
# Bits of the positive and, read as unsigned, of the negative infinity.
_INFINITY_BITS = {
    torch.float16: ((np.int16, np.uint16), 0x7C00, 0xFC00),
    torch.bfloat16: ((np.int16, np.uint16), 0x7F80, 0xFF80),
    torch.float32: ((np.int32, np.uint32), 0x7F80_0000, 0xFF80_0000),
}


class RecordPlace(NamedTuple):
    """The image, bucket and draw that a record belongs to."""

    image_id: str
    width: int
    height: int
    draw: int


def wrong_values(
    tensors: Mapping[str, torch.Tensor],
    place: RecordPlace,
    recipe: NoiseRecipe | None,
    action: str,
) -> Iterator[CorruptError]:
    """Yield what is wrong with the tensors of a record.

    Args:
        tensors: the record's tensors, of the dtypes and shapes that its schema wants.
        place: the record's image, bucket and draw.
        recipe: the recipe of noise and timesteps; None when it is not known: then the noise is only
            compared with the seed next to it.
        action: the advice in the errors.
    """
    # What no tensor may hold, then what follows from the key and the recipe.
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            num_bad = int((~tensor.isfinite()).sum())
            yield CorruptError(
                f"{name} has {num_bad} values that are NaN or infinite",
                expected="finite values",
                action=action,
            )
    yield from _wrong_draw(tensors, place, recipe, action)
    if "resolution" in tensors:
        yield from _unequal(tensors, "resolution", [place.width, place.height], action)
    if "time_ids" in tensors:
        yield from _implausible_time_ids(_integers(tensors["time_ids"]), place, action)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, ten times faster than `isfinite` on 16 bits.

    The bits of numbers of one sign grow with their magnitude, and infinity and NaN are the
    largest. Read as signed integers, positive numbers come last; read as unsigned, negative ones.
    """
    integers, positive, negative = _INFINITY_BITS[tensor.dtype]
    content = byte_view(tensor.contiguous())
    if not content:
        return True
    signed, unsigned = (np.frombuffer(content, each) for each in integers)
    return int(signed.max()) < positive and int(unsigned.max()) < negative


def _wrong_draw(
    tensors: Mapping[str, torch.Tensor],
    place: RecordPlace,
    recipe: NoiseRecipe | None,
    action: str,
) -> Iterator[CorruptError]:
    if "seed" not in tensors:
        return
    if recipe is not None and "timestep" in tensors:
        seed = noise_seed(place.image_id, recipe.base_seed, place.draw)
        yield from _unequal(tensors, "seed", [seed], action)
        step = timestep(
            place.image_id,
            recipe.base_seed,
            place.draw,
            recipe.min_timestep,
            recipe.max_timestep,
        )
        yield from _unequal(tensors, "timestep", [step], action)
    seed = int(tensors["seed"])
    if not 0 <= seed < _MAX_SEED:
        yield CorruptError(f"seed {seed}", expected="a whole number of 32 bits", action=action)
    elif "noise" in tensors:
        stored = tensors["noise"]
        expected = noise(seed, place.width, place.height, stored.shape[0])
        if tensor_digest(stored) != tensor_digest(expected):
            yield CorruptError(
                "the noise is not what its seed gives",
                expected=f"the noise of seed {seed}",
                action=action,
            )


def _unequal(
    tensors: Mapping[str, torch.Tensor], name: str, expected: list[int], action: str
) -> Iterator[CorruptError]:
    found = _integers(tensors[name])
    if found != expected:
        yield CorruptError(
            f"{name} is {_describe(found)}", expected=f"{_describe(expected)}", action=action
        )


def _implausible_time_ids(
    time_ids: list[int], place: RecordPlace, action: str
) -> Iterator[CorruptError]:
    """Yield an error unless the crop lies inside the image, resized to cover the bucket."""
    original_height, original_width, top, left, *target = time_ids
    is_plausible = (
        target == [place.height, place.width] and min(original_height, original_width) > 0
    )
    if is_plausible:
        bucket = Bucket(place.width, place.height)
        crop = cover_crop(original_width, original_height, bucket)
        is_plausible = (
            0 <= left <= crop.resized_width - place.width
            and 0 <= top <= crop.resized_height - place.height
        )
    if not is_plausible:
        yield CorruptError(
            f"time_ids are {time_ids}",
            expected="height and width of the image, a crop inside it, "
            f"{place.height}, {place.width}",
            action=action,
        )


def _integers(tensor: torch.Tensor) -> list[int]:
    return [int(value) for value in tensor]


def _describe(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else str(values)
