"""Random words, rounding to 16 bits, and masters split into weight and remainder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdxl_distill.optimizer.stochastic_rounding import (
    high_half,
    int32_scalar,
    join_master,
    low_half,
    random_words,
    round_stochastically,
    rounding_key,
    split_master,
)

pytestmark = pytest.mark.processors

CPU = torch.device("cpu")
NUM_WORDS = 1 << 18


def words_of(*numbers: int, first: int = 0, count: int = NUM_WORDS) -> torch.Tensor:
    return random_words(rounding_key(*numbers), int32_scalar(first), count, CPU)


def bits_of(words: torch.Tensor) -> np.ndarray:
    """All bits as float64 [words, 32]."""
    unsigned = words.numpy().view(np.uint32)
    return (unsigned[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.float64)


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_the_words_are_those_of_a_plain_integer_implementation() -> None:
    def fmix32(word: int) -> int:
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    key = rounding_key(42, 7, 3, 1)
    low, high = int(key.low) % 2**32, int(key.high) % 2**32
    expected = [fmix32(fmix32(element ^ low) ^ high) for element in range(1000)]

    assert words_of(42, 7, 3, 1, count=1000).numpy().view(np.uint32).tolist() == expected


def test_the_words_of_a_known_key_never_change() -> None:
    # Bit-equal resuming across versions rests on these: a change needs a new algorithm name.
    words = words_of(42, 7, 3, 1, count=4)

    assert words.tolist() == [-1137526179, -2030525028, 1853054200, 1392375711]


def test_the_key_of_one_zero_is_the_first_output_of_splitmix64() -> None:
    # 0xE220A8397B1DCDAF is the published first output for the seed 0.
    key = rounding_key(0)

    assert int(key.low) % 2**32 == 0x7B1DCDAF
    assert int(key.high) % 2**32 == 0xE220A839


def test_every_bit_is_set_in_half_of_the_words() -> None:
    deviations = np.abs(bits_of(words_of(0, 1, 0, 0)).mean(axis=0) - 0.5)

    assert deviations.max() < 5 * 0.5 / NUM_WORDS**0.5


def test_bits_of_one_word_are_uncorrelated() -> None:
    signs = 2 * bits_of(words_of(0, 1, 0, 0)) - 1
    correlations = signs.T @ signs / NUM_WORDS - np.eye(32)

    assert np.abs(correlations).max() < 6 / NUM_WORDS**0.5


@pytest.mark.parametrize("other", [(1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)])
def test_seed_step_parameter_and_purpose_each_give_unrelated_words(
    other: tuple[int, int, int, int],
) -> None:
    signs = 2 * bits_of(words_of(0, 1, 0, 0)) - 1
    other_signs = 2 * bits_of(words_of(*other)) - 1

    assert np.abs(signs.T @ other_signs / NUM_WORDS).max() < 6 / NUM_WORDS**0.5


def test_words_of_neighbouring_elements_are_uncorrelated() -> None:
    signs = 2 * bits_of(words_of(0, 1, 0, 0)) - 1
    correlations = signs[1:].T @ signs[:-1] / NUM_WORDS

    assert np.abs(correlations).max() < 6 / NUM_WORDS**0.5


@pytest.mark.parametrize("first", [1, 1000, 2**31 - 5, 2**32 - 5])
def test_a_slice_has_the_words_of_the_whole(first: int) -> None:
    whole = words_of(5, first=first - 1, count=101)

    assert torch.equal(words_of(5, first=first, count=100), whole[1:])


def test_both_halves_lie_in_16_bits_and_make_up_the_word() -> None:
    words = words_of(9)
    high, low = high_half(words).long(), low_half(words).long()

    assert high.min() >= 0
    assert high.max() < 65536
    assert torch.equal(high * 65536 + low, words.long() % 2**32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0123456, -1.7654321, 3.3e-6, -2.2e-7, 1.0])
def test_the_mean_of_all_roundings_is_the_value(value: float, dtype: torch.dtype) -> None:
    random16 = torch.arange(65536, dtype=torch.int32)
    exact = torch.full((65536,), value)

    rounded = round_stochastically(exact, dtype, random16)

    neighbours = rounded.unique().double()
    spacing = (neighbours.max() - neighbours.min()).item()
    assert len(neighbours) <= 2
    assert rounded.double().mean().item() == pytest.approx(exact[0].item(), abs=spacing / 2**14)


def test_a_plain_rounding_does_not_have_the_mean_of_the_value() -> None:
    value = torch.tensor(1.001)

    assert value.bfloat16().double().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_representable_numbers_nan_and_infinity_stay_whatever_the_bits(dtype: torch.dtype) -> None:
    values = all_bfloat16().view(dtype)
    for random16 in (0, 1, 40000, 65535):
        bits = torch.full(values.shape, random16, dtype=torch.int32)
        rounded = round_stochastically(values.float(), dtype, bits)
        assert torch.equal(rounded.isnan(), values.isnan())
        assert torch.equal(rounded.nan_to_num(0.5), values.nan_to_num(0.5))


def test_the_widest_nan_stays_nan() -> None:
    widest = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    bits = torch.full((2,), 65535, dtype=torch.int32)

    assert round_stochastically(widest, torch.bfloat16, bits).isnan().all()
    assert split_master(widest)[0].isnan().all()


def test_splitting_and_joining_a_master_keeps_every_bit() -> None:
    # Every upper half beside the lower halves around the rounding limit.
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    master = (upper[:, None] | lower).view(torch.float32)
    master = master[~master.isnan()]

    weight, remainder = split_master(master)

    assert remainder.dtype == torch.int16
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))


def test_the_weight_of_a_master_is_a_nearest_bfloat16() -> None:
    master = words_of(3).view(torch.float32)
    master = master[master.isfinite() & (master.abs() < 1e38)]

    error = (split_master(master)[0].double() - master.double()).abs()

    assert (error <= (master.bfloat16().double() - master.double()).abs()).all()
