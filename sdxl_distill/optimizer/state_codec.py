"""Optimizer state in eight bits: small floating-point codes and one float32 scale per block.

Owns the two code formats, how a tensor is cut into blocks, and encoding with stochastic
rounding. Plain rounding would freeze a second moment, which moves by far less than one code a
step. Block-wise scales: Dettmers et al., "8-bit optimizers via block-wise quantization" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from sdxl_distill.optimizer.stochastic_rounding import whole_stochastically

MIN_ENCODED_ELEMENTS = 4096
MAX_BLOCK_ELEMENTS = 256
MIN_BLOCK_ELEMENTS = 32

_EXPONENT_BITS = 4
_FLOAT32_MANTISSA_BITS = 23
# The largest code's exponent is 0, which float32 writes as 127.
_EXPONENT_OFFSET = 127 - (1 << _EXPONENT_BITS) + 1
_MIN_NORMAL_EXPONENT = 2 - (1 << _EXPONENT_BITS)


@dataclass(frozen=True)
class CodeFormat:
    """An 8-bit floating-point format with 4 exponent bits, subnormal codes and no infinity.

    Attributes:
        signed: true when the highest bit is a sign.
        lowest: the code that stands for the smallest magnitudes, 0 or 1. With 1 nothing
            becomes zero.
    """

    signed: bool
    lowest: int = 0

    @property
    def mantissa_bits(self) -> int:
        """Bits left besides sign and exponent: 3 or 4."""
        return 8 - _EXPONENT_BITS - self.signed

    @property
    def largest(self) -> float:
        """The value of the highest code under a scale of 1: 1.875 or 1.9375."""
        return 2.0 - 2.0**-self.mantissa_bits

    @property
    def _cut_bits(self) -> int:
        return _FLOAT32_MANTISSA_BITS - self.mantissa_bits

    @property
    def _subnormals_per_unit(self) -> float:
        return 2.0 ** (self.mantissa_bits - _MIN_NORMAL_EXPONENT)

    def encode(
        self, values: torch.Tensor, random16: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode blocks of values; on average they decode to the value itself.

        Args:
            values: float32 [blocks, block], not negative unless `signed`.
            random16: int32 in 0..65535, same shape.

        Returns:
            uint8 codes [blocks, block] and float32 scales [blocks]. A block that holds NaN or
            infinity decodes to no finite value.
        """
        magnitudes = values.abs()
        scales = magnitudes.amax(dim=1, keepdim=True) / self.largest
        # A normal scale keeps the division within one bit of `largest`, and the random bits end
        # above that bit: no carry leaves the format. A scale of zero would make NaN of zeros.
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        scaled = magnitudes / scales
        bits = scaled.view(torch.int32) + (random16 << self._cut_bits - 16)
        normal = (bits >> self._cut_bits) - (_EXPONENT_OFFSET << self.mantissa_bits)
        steps = whole_stochastically(scaled * self._subnormals_per_unit, random16)
        is_subnormal = scaled < 2.0**_MIN_NORMAL_EXPONENT
        codes = torch.where(is_subnormal, steps.to(torch.int32), normal)
        codes = codes.clamp(min=self.lowest)
        if self.signed:
            codes = codes | (values < 0).to(torch.int32) << 7
        return codes.to(torch.uint8), scales.squeeze(1)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return float32 [blocks, block] of uint8 codes and the float32 scales [blocks]."""
        words = codes.to(torch.int32)
        magnitudes = words & 0x7F if self.signed else words
        bits = (magnitudes << self._cut_bits) + (_EXPONENT_OFFSET << _FLOAT32_MANTISSA_BITS)
        is_subnormal = magnitudes < 1 << self.mantissa_bits
        values = torch.where(
            is_subnormal, magnitudes / self._subnormals_per_unit, bits.view(torch.float32)
        )
        if self.signed:
            values = torch.where(words > 0x7F, -values, values)
        return values * scales.unsqueeze(1)


EXP_AVG_CODE = CodeFormat(signed=True)
# A root rounded to zero would make a huge update unless the first moment is zero too.
EXP_AVG_SQ_ROOT_CODE = CodeFormat(signed=False, lowest=1)


def block_elements(shape: Sequence[int]) -> int | None:
    """Return how many neighbouring elements of a tensor share a scale.

    A block lies within one row, that is, the elements with one first index, so that a tensor
    sharded along its first dimension keeps its blocks. The block is the largest divisor of the
    row up to 256.

    Args:
        shape: the parameter's shape.

    Returns:
        The length of a block, or None where the state should stay float32: tensors below 4,096
        elements, vectors, and rows whose length has no divisor of at least 32.
    """
    row = prod(shape[1:])
    if prod(shape) < MIN_ENCODED_ELEMENTS:
        return None
    divisors = range(MAX_BLOCK_ELEMENTS, MIN_BLOCK_ELEMENTS - 1, -1)
    return next((block for block in divisors if row % block == 0), None)
