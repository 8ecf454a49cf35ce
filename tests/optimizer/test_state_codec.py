"""Optimizer state in eight bits."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.optimizer.state_codec import (
    EXP_AVG_CODE,
    EXP_AVG_SQ_ROOT_CODE,
    CodeFormat,
    block_elements,
)
from sdxl_distill.optimizer.stochastic_rounding import (
    high_half,
    int32_scalar,
    random_words,
    rounding_key,
)

pytestmark = pytest.mark.processors

FORMATS = {"exp_avg": EXP_AVG_CODE, "exp_avg_sq_root": EXP_AVG_SQ_ROOT_CODE}
any_format = pytest.mark.parametrize("code", FORMATS.values(), ids=FORMATS)


def random16(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    count = shape[0] * shape[1]
    words = random_words(rounding_key(seed), int32_scalar(0), count, torch.device("cpu"))
    return high_half(words).view(shape)


def all_codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 256)


def values_of_scale_one(code: CodeFormat) -> list[float]:
    """The magnitudes that the format has, written down from its definition alone."""
    mantissas = 2**code.mantissa_bits
    subnormal = [m / mantissas * 2.0**-14 for m in range(mantissas)]
    normal = [(1 + m / mantissas) * 2.0**e for e in range(-14, 1) for m in range(mantissas)]
    return subnormal + normal


@any_format
def test_codes_mean_the_floating_point_numbers_of_the_definition(code: CodeFormat) -> None:
    expected = values_of_scale_one(code)
    if code.signed:
        expected += [-value for value in expected]

    assert code.decode(all_codes(), torch.ones(1))[0].tolist() == expected


@any_format
@pytest.mark.parametrize("noise", [0, 32768, 65535])
def test_encoding_a_decoded_block_gives_the_same_codes(code: CodeFormat, noise: int) -> None:
    first = 1 if code is EXP_AVG_SQ_ROOT_CODE else 0
    codes = all_codes()[:, first:]
    codes = codes[codes != 0x80].view(1, -1) if code.signed else codes  # minus zero becomes zero
    scales = torch.tensor([0.37])
    noise16 = torch.full(codes.shape, noise, dtype=torch.int32)

    again, again_scales = code.encode(code.decode(codes, torch.ones(1)), noise16)

    assert torch.equal(again, codes)
    assert again_scales.tolist() == [1.0]
    assert torch.equal(code.decode(again, scales), code.decode(codes, torch.ones(1)) * 0.37)


@any_format
def test_the_mean_of_all_encodings_is_the_value_in_every_binade(code: CodeFormat) -> None:
    # One block per random word: its first value fixes the scale, the others are watched.
    magnitudes = torch.tensor([1.9, 1.37, 0.511, 0.0371, 2.9e-3, 1.03e-4, 4.4e-5, 1.9e-5])
    noise16 = torch.arange(0, 65536, 8, dtype=torch.int32)[:, None].expand(-1, 8).contiguous()
    values = magnitudes.expand(len(noise16), 8).contiguous()

    decoded = code.decode(*code.encode(values, noise16))

    spacing = decoded.amax(dim=0) - decoded.amin(dim=0)
    bias = (decoded.double().mean(dim=0) - magnitudes).abs()
    assert (bias <= spacing / 1000 + magnitudes * 1e-6).all()
    assert (spacing[1:] > 0).all()


@any_format
@pytest.mark.parametrize("largest", [1e-36, 1.0, 3e38])
def test_the_largest_value_of_a_block_keeps_its_value(code: CodeFormat, largest: float) -> None:
    values = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) * largest
    values[:, 17] = largest

    decoded = code.decode(*code.encode(values, random16((64, 256))))

    assert decoded[:, 17].tolist() == pytest.approx([largest] * 64, rel=1e-6, abs=0)


@any_format
def test_no_random_bits_carry_the_largest_value_out_of_the_format(code: CodeFormat) -> None:
    # Largest over scale comes out one bit above the format's end for some of these.
    values = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)) + 1e-3
    all_ones = torch.full(values.shape, 65535, dtype=torch.int32)

    torch.testing.assert_close(code.decode(*code.encode(values, all_ones)), values)


@any_format
def test_subnormal_values_are_kept_to_one_code(code: CodeFormat) -> None:
    smallest = torch.finfo(torch.float32).tiny
    values = torch.arange(1, 5000).view(-1, 1) * 2.0**-149
    all_ones = torch.full(values.shape, 65535, dtype=torch.int32)

    decoded = code.decode(*code.encode(values, all_ones))

    one_code = (values / 8).clamp(min=smallest * 2.0**-17)
    assert ((decoded - values).abs() <= one_code).all()


def test_zero_first_moments_stay_zero() -> None:
    zeros = torch.zeros(1, 256)

    codes, scales = EXP_AVG_CODE.encode(zeros, random16((1, 256)))

    assert not codes.any()
    assert torch.equal(EXP_AVG_CODE.decode(codes, scales), zeros)


def test_a_root_beside_a_huge_one_never_becomes_zero() -> None:
    values = torch.full((1, 256), 1e-9)
    values[0, 0] = 1.0

    codes, scales = EXP_AVG_SQ_ROOT_CODE.encode(values, random16((1, 256)))

    assert (EXP_AVG_SQ_ROOT_CODE.decode(codes, scales) > 0).all()


@any_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_block_and_no_other(code: CodeFormat, bad: float) -> None:
    values = torch.ones(2, 256)
    values[0, 3] = bad

    decoded = code.decode(*code.encode(values, random16((2, 256))))

    assert not decoded[0].isfinite().any()
    assert torch.equal(decoded[1], values[1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1280, 2048), 256),
        ((640, 320, 3, 3), 240),
        ((320, 4, 3, 3), 36),
        ((4, 320, 3, 3), 240),
        ((64, 63), None),
        ((10240,), None),
        ((100, 257), None),
        ((100, 62), 62),
        ((16, 255), None),
        ((), None),
    ],
)
def test_a_block_is_the_largest_divisor_of_a_row(
    shape: tuple[int, ...], expected: int | None
) -> None:
    assert block_elements(shape) == expected
