from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from sdxl_distill.order.permutation import Purpose, derive, mix, permute, shuffled

GOLDEN_RATIO = 0x9E3779B97F4A7C15
WORD = 2**64 - 1


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def permutations(length: int, num_keys: int, first_key: int = 0) -> np.ndarray:
    """Return the whole permutation of each key, [num_keys, length]."""
    keys = mix(np.arange(first_key, first_key + num_keys, dtype=np.uint64))
    positions = np.tile(np.arange(length), num_keys)
    lengths = np.full(positions.size, length)
    return permute(positions, lengths, np.repeat(keys, length)).reshape(num_keys, length)


def test_mix_gives_the_published_outputs_of_splitmix64() -> None:
    states = words(0, GOLDEN_RATIO, 2 * GOLDEN_RATIO & WORD, 1234567)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 6457827717110365317]
    assert mix(states).tolist() == published


def test_derive_folds_part_by_part() -> None:
    def scalar_mix(word: int) -> int:
        return int(mix(words(word))[0])

    expected = 7
    for part in (3, 0, 2**40):
        expected = scalar_mix(expected ^ scalar_mix(part))
    assert derive(7, 3, 0, 2**40).tolist() == [expected]


def test_derive_of_an_array_is_derive_of_each_element() -> None:
    parts = np.array([[0, 1, 2], [3, 2**40, 5]])
    one_by_one = [[int(derive(9, 1, int(part), 4)[0]) for part in row] for row in parts]
    assert derive(9, 1, parts, 4).tolist() == one_by_one


def test_derive_takes_the_largest_seed() -> None:
    assert derive(WORD, 1).tolist() != derive(WORD - 1, 1).tolist()


def test_no_two_purposes_share_a_key_and_those_of_today_stay() -> None:
    numbers = {name: int(purpose) for name, purpose in Purpose.__members__.items()}
    assert numbers == {"SHARD": 0, "PHASE": 1, "BLOCK": 2, "LAP": 3, "LANE": 4}


def test_shuffled_sorts_by_the_hash_of_each_number() -> None:
    key = words(5)
    hashes = [int(derive(key, number)[0]) for number in range(100)]
    assert shuffled(key, 100).tolist() == sorted(range(100), key=hashes.__getitem__)


@given(length=st.integers(1, 300), first_key=st.integers(0, 2**60))
def test_permute_is_a_bijection(length: int, first_key: int) -> None:
    permuted = permutations(length, 3, first_key)
    assert (np.sort(permuted, axis=1) == np.arange(length)).all()


@given(
    elements=st.lists(
        st.integers(1, 2**32).flatmap(
            lambda n: st.tuples(st.integers(0, n - 1), st.just(n), st.integers(0, WORD))
        ),
        min_size=1,
        max_size=20,
    )
)
def test_permute_treats_each_element_alone_and_stays_in_range(
    elements: list[tuple[int, int, int]],
) -> None:
    positions, lengths, keys = zip(*elements, strict=True)
    permuted = permute(np.array(positions), np.array(lengths), words(*keys))
    alone = [int(permute(np.array([x]), np.array([n]), words(key))[0]) for x, n, key in elements]
    assert permuted.tolist() == alone
    assert (permuted >= 0).all() and (permuted < lengths).all()


def scalar_permute(position: int, length: int, key: int) -> int:
    """Permute by integers of any size."""
    num_bits = 0
    while 2**num_bits < length:
        num_bits += 1
    rounds = [int(derive(words(key), number)[0]) for number in range(5)]
    while True:
        for word in rounds[:4]:
            odd, add = 2 * word + 1, word // 2**32
            position = (position * odd + add) % 2**num_bits
            position ^= position >> max(1, num_bits // 2)
        position = (position + rounds[4]) % 2**num_bits
        if position < length:
            return position


@given(length=st.integers(1, 2**32), position=st.integers(0, 2**32 - 1), key=st.integers(0, WORD))
@example(length=1, position=0, key=WORD)
@example(length=2**32, position=2**32 - 1, key=WORD)
def test_permute_is_its_formula_over_the_integers(length: int, position: int, key: int) -> None:
    position %= length
    found = permute(np.array([position]), np.array([length]), words(key))
    assert found.tolist() == [scalar_permute(position, length, key)]


def test_permute_leaves_its_arguments_alone() -> None:
    positions, lengths, keys = np.arange(5), np.full(5, 5), words(1, 1, 1, 1, 1)
    permute(positions, lengths, keys)
    assert positions.tolist() == list(range(5)) and lengths.tolist() == [5] * 5
    assert keys.tolist() == [1] * 5


@pytest.mark.parametrize("length", [16, 17, 100, 256, 1000])
def test_neighbours_and_places_correlate_no_more_than_by_chance(length: int) -> None:
    permuted = permutations(length, 1000).astype(float)
    places = np.arange(length)
    identity = np.mean([np.corrcoef(places, order)[0, 1] for order in permuted])
    lag_one = np.mean([np.corrcoef(order[:-1], order[1:])[0, 1] for order in permuted])
    # Standard deviations of the mean over 1,000 uniform permutations: 1/√((n−1)·1000).
    tolerance = 6 / np.sqrt((length - 1) * 1000)
    assert abs(identity) < tolerance
    assert abs(lag_one + 1 / (length - 1)) < tolerance


@pytest.mark.parametrize("length", range(2, 17))
def test_of_any_two_either_comes_first_equally_often(length: int) -> None:
    permuted = permutations(length, 20_000)
    bias = [
        abs(2 * np.mean(permuted[:, left] < permuted[:, right]) - 1)
        for left in range(length)
        for right in range(left)
    ]
    assert max(bias) < 0.05
