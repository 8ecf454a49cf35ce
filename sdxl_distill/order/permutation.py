"""Hashes and permutations of integers whose bits are ours, not a library's.

numpy keeps the streams of its bit generators stable, but not `permutation` or `shuffle` (NEP 19);
the stream order is a format, so it stands on splitmix64 and uint64 arithmetic alone. See
docs/determinism.md, "Hash".
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

_NUM_ROUNDS = 4
_ONE = np.uint64(1)
_HALF_WORD = np.uint64(32)


class Purpose(IntEnum):
    """First part of every derived key, so that no two uses of the seed collide."""

    SHARD = 0
    PHASE = 1
    BLOCK = 2
    LAP = 3
    LANE = 4


def mix(words: UInt64s) -> UInt64s:
    """Hash each word with one step of splitmix64; a bijection of uint64.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the
    constants are those of Vigna's splitmix64.c, of which this is the output for the state `words`.

    Args:
        words: uint64 of at least one dimension (numpy warns of overflow in scalars only).
    """
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def derive(key: int | UInt64s, *parts: int | Int64s | UInt64s) -> UInt64s:
    """Fold non-negative integers into a key: key ← mix(key ^ mix(part)), part by part.

    For one key and differing last parts the results differ: `mix` is a bijection.

    Returns:
        uint64 in the common broadcast shape, at least [1].
    """
    derived = _words(key)
    for part in parts:
        derived = mix(derived ^ mix(_words(part)))
    return derived


def shuffled(key: UInt64s, length: int) -> Int64s:
    """Return 0 … length − 1 in the order of `derive(key, 0 … length − 1)`; [length].

    The hashes differ from one another, so the order does not depend on the sort.
    """
    return np.argsort(derive(key, np.arange(length, dtype=np.int64)))


def permute(positions: Int64s, lengths: Int64s, keys: UInt64s) -> Int64s:
    """Apply to each position the permutation of 0 … length − 1 that its key selects.

    A bijection on the next power of two (rounds of x ← x·odd + add, x ← x ^ (x >> half the bits)),
    applied again while the result is not below the length (cycle walking; Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).

    Args:
        positions: int64 [N], 0 ≤ position < length.
        lengths: int64 [N], 1 … 2³².
        keys: uint64 [N], any bits.

    Returns:
        int64 [N], 0 ≤ result < length.
    """
    limits = lengths.astype(np.uint64)
    num_bits = np.frexp((lengths - 1).astype(np.float64))[1].astype(np.uint64)
    masks = (_ONE << num_bits) - _ONE
    shifts = np.maximum(_ONE, num_bits >> _ONE)
    rounds = derive(keys, np.arange(_NUM_ROUNDS + 1, dtype=np.int64)[:, np.newaxis])

    permuted = _scramble(positions.astype(np.uint64), masks, shifts, rounds)
    outside = np.flatnonzero(permuted >= limits)
    while outside.size:
        permuted[outside] = _scramble(
            permuted[outside], masks[outside], shifts[outside], rounds[:, outside]
        )
        outside = outside[permuted[outside] >= limits[outside]]
    return permuted.astype(np.int64)


def _scramble(words: UInt64s, masks: UInt64s, shifts: UInt64s, rounds: UInt64s) -> UInt64s:
    """Permute 0 … mask by round words [5, N]: low half → odd factor, high half → summand."""
    for word in rounds[:_NUM_ROUNDS]:
        words = (words * (word << _ONE | _ONE) + (word >> _HALF_WORD)) & masks
        words ^= words >> shifts
    return (words + rounds[_NUM_ROUNDS]) & masks


def _words(values: int | Int64s | UInt64s) -> UInt64s:
    return np.atleast_1d(np.asarray(values)).astype(np.uint64, copy=False)
