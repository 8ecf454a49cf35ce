"""AdamW with stochastic rounding and 8-bit states, as the formulas say it; numpy but for roots.

Every other operation is a float32 or integer one with a single right result on every processor.
Roots are torch's: up to one in five is not the nearest float32, and which depends on MKL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

MASK_64 = 2**64 - 1
WEIGHT, STATE = 0, 1  # what random words are for


@dataclass
class Moments:
    """Of one parameter, decoded, [rows, elements of a row]; `exact` is its float32 value."""

    exact: Floats
    first: Floats = field(init=False)
    second: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = np.zeros_like(self.exact), np.zeros_like(self.exact)


@dataclass(frozen=True)
class PlainAdamW:
    """One step of one parameter after another; the settings are those of `AdamW`."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    states: str = "fp32"
    exact_masters: bool = False
    seed: int = 0
    rounds: bool = True  # whether weights have bfloat16

    def step(self, moments: Moments, gradient: Floats, step: int, number: int, **now: Any) -> None:
        """Update `moments` in place; afterwards its `exact` is the weight, or the master of it.

        Args:
            moments: of the parameter.
            gradient: float32, same shape.
            step: counted from 1.
            number: of the parameter, counted from 0.
            now: `lr`, where it differs from step to step.
        """
        f32, (beta1, beta2), lr = np.float32, self.betas, now.get("lr", self.lr)
        first = moments.first + (gradient - moments.first) * f32(1 - beta1)
        second = moments.second * f32(beta2) + gradient * gradient * f32(1 - beta2)
        root = root_of(second) / f32(sqrt(1 - beta2**step)) + f32(self.eps)
        update = first / root * f32(lr / (1 - beta1**step))
        moments.exact = moments.exact - (update + moments.exact * f32(lr * self.weight_decay))

        moments.first, moments.second = first, second
        block = block_of(first.shape) if self.states == "8bit" else None
        if block is not None:
            words = random_words(first.size, self.seed, step, number, STATE).reshape(-1, block)
            decoded = in_eight_bits(first.reshape(-1, block), words >> 16, mantissa_bits=3)
            moments.first = decoded.reshape(first.shape)
            roots = root_of(second).reshape(-1, block)
            decoded = in_eight_bits(roots, words & 0xFFFF, mantissa_bits=4, lowest=1)
            moments.second = (decoded * decoded).reshape(first.shape)
        if self.rounds and not self.exact_masters:
            words = random_words(first.size, self.seed, step, number, WEIGHT).reshape(first.shape)
            moments.exact = upper_half(moments.exact, words >> 16)

    def weight(self, moments: Moments) -> Floats:
        """Return the parameter as the model has it, in float32."""
        return upper_half(moments.exact, 0x8000) if self.exact_masters else moments.exact


def root_of(values: Floats) -> Floats:
    """Return torch's square roots."""
    return torch.from_numpy(values).sqrt().numpy()


def block_of(shape: tuple[int, ...]) -> int | None:
    """Return how many elements share a scale; None where a state keeps float32."""
    row = prod(shape[1:])
    fitting = [block for block in range(32, 257) if row % block == 0]
    return max(fitting) if fitting and prod(shape) >= 4096 else None


def random_words(count: int, *numbers: int) -> Words:
    """Return a word for each element: splitmix64 over the numbers, then murmur's finaliser."""
    state = 0
    for number in numbers:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK_64
        state ^= state >> 31
    words: npt.NDArray[Any] = np.arange(count, dtype=np.uint32)
    for half in (state & 0xFFFFFFFF, state >> 32):
        words = words ^ np.uint32(half)
        words = (words ^ words >> 16) * np.uint32(0x85EBCA6B)
        words = (words ^ words >> 13) * np.uint32(0xC2B2AE35)
        words = words ^ words >> 16
    return words


def upper_half(values: Floats, random16: Words | int) -> Floats:
    """Add to the lower 16 bits and cut them: bfloat16, kept as float32."""
    bits = values.view(np.uint32) + np.uint32(random16)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def in_eight_bits(values: Floats, random16: Words, mantissa_bits: int, lowest: int = 0) -> Floats:
    """Return what values [blocks, block] are after one of the two nearest codes was stored."""
    per_octave = 1 << mantissa_bits
    codes = np.arange(16 * per_octave)
    octaves, steps = codes // per_octave, codes % per_octave
    table = np.where(octaves == 0, steps, per_octave + steps) / per_octave
    table = table * 2.0 ** (np.maximum(octaves, 1) - 15)

    sizes = np.abs(values)
    scales = sizes.max(axis=1, keepdims=True) / np.float32(table[-1])
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    scaled = (sizes / scales).astype(np.float64)
    below = np.minimum(np.searchsorted(table, scaled, side="right") - 1, len(table) - 2)
    part, chance = (scaled - table[below]) / (table[below + 1] - table[below]), random16 / 65536
    up = np.where(scaled < 2.0**-14, chance < part, part + chance >= 1)
    code = np.maximum(np.minimum(below + up, len(table) - 1), lowest)
    decoded = table[code].astype(np.float32) * scales
    return np.where(values < 0, -decoded, decoded)
