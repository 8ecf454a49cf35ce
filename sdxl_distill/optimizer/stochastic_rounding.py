"""Writing float32 values into 16-bit weights without losing small updates.

Owns the hash that supplies random bits, rounding by adding random low bits and cutting, and
the exact alternative: a float32 master kept as a bfloat16 weight and a 16-bit remainder.
All functions are pure; none reads or advances a random generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

RANDOM_BITS_ALGORITHM = "splitmix64-fmix32-1"

_MASK_64 = (1 << 64) - 1
_QUIET_NAN_BITS = 0x7FC00000
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_FLOAT16_SUBNORMALS_PER_UNIT = 2.0**24
_FLOAT16_DROPPED_BITS = 13


class RoundingKey(NamedTuple):
    """64 bits that select one stream of random words.

    Both halves are int32 scalar tensors on the CPU: kernels of any device take them as
    arguments, so that a new key costs neither a copy, nor a wait, nor a compilation.
    """

    low: torch.Tensor
    high: torch.Tensor


def rounding_key(*numbers: int) -> RoundingKey:
    """Hash integers, in their order, to a key.

    Source: the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), chained over the numbers.
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK_64)) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return RoundingKey(int32_scalar(state), int32_scalar(state >> 32))


def int32_scalar(number: int) -> torch.Tensor:
    """Return the low 32 bits of `number` as an int32 scalar tensor on the CPU."""
    return torch.tensor(_signed32(number), dtype=torch.int32)


def random_words(
    key: RoundingKey, first_element: torch.Tensor, num_elements: int, device: torch.device
) -> torch.Tensor:
    """Return 32 random bits for each element of a slice of a tensor.

    A word depends on the key and the element's number alone, so it does not matter how a tensor
    is cut into chunks or shards. Elements 2^32 apart in one tensor share their word.

    Args:
        key: hash of seed, step, parameter and purpose.
        first_element: number of the slice's first element in the whole tensor, from 0, as
            `int32_scalar` gives it.
        num_elements: length of the slice.
        device: device that the words are made on.

    Returns:
        int32 [num_elements], uniform over all 2^32 values.
    """
    elements = torch.arange(num_elements, dtype=torch.int32, device=device) + first_element
    return _fmix32(_fmix32(elements ^ key.low) ^ key.high)


def high_half(words: torch.Tensor) -> torch.Tensor:
    """Return the upper 16 bits of int32 words as int32 in 0..65535."""
    return _shift_right(words, 16)


def low_half(words: torch.Tensor) -> torch.Tensor:
    """Return the lower 16 bits of int32 words as int32 in 0..65535."""
    return words & 0xFFFF


def round_stochastically(
    values: torch.Tensor, dtype: torch.dtype, random16: torch.Tensor
) -> torch.Tensor:
    """Round to one of the two nearest 16-bit numbers, so that the mean is the value itself.

    The random bits are added below the last kept bit and the sum is cut: the carry has exactly
    the probability of the part that is cut off. NaN and infinities pass through unchanged.

    Args:
        values: float32, any shape.
        dtype: bfloat16 or float16.
        random16: int32 in 0..65535, same shape.

    Source: Gupta et al., "Deep learning with limited numerical precision" (2015), for rounding
    in proportion to distance.
    """
    if dtype == torch.bfloat16:
        rounded = _cut(values, random16, dropped_bits=16)
    else:
        magnitudes = values.abs()
        normal = _cut(magnitudes, random16, dropped_bits=_FLOAT16_DROPPED_BITS)
        # Subnormal float16 numbers are evenly spaced: bits of the mantissa do not count there.
        steps = whole_stochastically(magnitudes * _FLOAT16_SUBNORMALS_PER_UNIT, random16)
        subnormal = steps / _FLOAT16_SUBNORMALS_PER_UNIT
        is_subnormal = magnitudes < _FLOAT16_SMALLEST_NORMAL
        rounded = torch.where(is_subnormal, subnormal, normal).copysign(values)
    # A carry out of a NaN's mantissa would turn it into zero and hide it.
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def whole_stochastically(values: torch.Tensor, random16: torch.Tensor) -> torch.Tensor:
    """Round float32 values ≥ 0 to one of the two nearest whole numbers; the mean is the value.

    Args:
        values: float32, any shape; fractions count as the next multiple of 2^-16 above.
        random16: int32 in 0..65535, same shape.
    """
    # Not floor(values + random): that sum is itself rounded, and up from 512.99999 to 513.
    whole = values.floor()
    return whole + (random16 * 2.0**-16 < values - whole)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split float32 values into the nearest bfloat16 weights and the remainders.

    Halves are rounded up in magnitude: rounding them to even would need a remainder of
    +32,768, one more than int16 holds. Every NaN becomes the same quiet NaN.

    Args:
        master: float32, any shape.

    Returns:
        bfloat16 weights and int16 remainders, from which `join_master` restores all 32 bits.
    """
    bits = torch.where(master.isnan(), _QUIET_NAN_BITS, master.view(torch.int32))
    upper = bits + 0x8000 >> 16
    remainder = bits - (upper << 16)
    return (upper << 16).view(torch.float32).to(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the float32 values that `split_master` has split.

    Args:
        weight: bfloat16, any shape.
        remainder: int16, same shape.
    """
    bits = weight.to(torch.float32).view(torch.int32) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def _cut(values: torch.Tensor, random16: torch.Tensor, dropped_bits: int) -> torch.Tensor:
    dropped = (1 << dropped_bits) - 1
    bits = values.view(torch.int32) + (random16 & dropped)
    return (bits & ~dropped).view(torch.float32)


def _fmix32(words: torch.Tensor) -> torch.Tensor:
    """Mix int32 words so that each input bit flips each output bit with probability 1/2.

    Source: the 32-bit finaliser of MurmurHash3 (Austin Appleby, public domain).
    """
    words = (words ^ _shift_right(words, 16)) * _signed32(0x85EBCA6B)
    words = (words ^ _shift_right(words, 13)) * _signed32(0xC2B2AE35)
    return words ^ _shift_right(words, 16)


def _shift_right(words: torch.Tensor, count: int) -> torch.Tensor:
    # `>>` copies the sign of an int32 downwards; the mask makes it the shift that a hash needs.
    return words >> count & (1 << 32 - count) - 1


def _signed32(number: int) -> int:
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
