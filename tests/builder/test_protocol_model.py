"""The protocol holds in every interleaving, and each simpler one fails in a named way."""

from __future__ import annotations

import pytest
from support.protocol_model import Protocol, find_violation

OVERWRITING = Protocol(create_only_tar=False, create_only_idx=False)
CHECKED = Protocol(create_only_tar=False, create_only_idx=False, check_claim_before_rename=True)


@pytest.mark.parametrize("withdraw", [False, True])
def test_no_interleaving_of_three_workers_breaks_an_invariant(withdraw: bool) -> None:
    violation, num_states = find_violation(Protocol(), num_workers=3, withdraw=withdraw)
    assert violation == []
    assert num_states > 2_000


@pytest.mark.parametrize(
    ("protocol", "num_steps"),
    [
        pytest.param(OVERWRITING, 9, id="F1 a zombie renames its tar over a committed one"),
        pytest.param(CHECKED, 12, id="F2 a look at the claim before the rename does not help"),
        pytest.param(
            Protocol(create_only_tar=False), 9, id="F3 only the index is made create-only"
        ),
        pytest.param(Protocol(keep_orphan_tar=False), 10, id="F4 an orphan tar is replaced"),
        pytest.param(
            Protocol(index_of_tar_there=False),
            9,
            id="F5 the second builder publishes its own index",
        ),
    ],
)
def test_a_weakened_protocol_mixes_tar_and_index(protocol: Protocol, num_steps: int) -> None:
    violation, _ = find_violation(protocol, num_workers=2, of="I2")
    assert violation[-1] == "I2: the index describes another tar"
    assert len(violation) - 1 <= num_steps


@pytest.mark.parametrize(
    "protocol",
    [
        pytest.param(Protocol(withdraw_by_rename=False), id="F22 delete, then build"),
        pytest.param(Protocol(handle_before_look=False), id="F22 paths instead of a handle"),
    ],
)
def test_a_weakened_withdrawal_lets_a_zombie_mix_tar_and_index(protocol: Protocol) -> None:
    violation, _ = find_violation(protocol, num_workers=2, withdraw=True, of="I2")
    assert violation[-1] == "I2: the index describes another tar"
    assert any(step.startswith("withdraw") for step in violation)


def test_paths_instead_of_a_handle_let_a_zombie_write_into_the_new_set() -> None:
    protocol = Protocol(handle_before_look=False)
    violation, _ = find_violation(protocol, num_workers=1, withdraw=True, of="I9")
    assert violation[-1] == "I9: a zombie changed the new set"


def test_two_looks_at_a_claim_are_needed_to_break_it_so_random_kills_seldom_do() -> None:
    simple, _ = find_violation(OVERWRITING, num_workers=2, of="I2")
    checked, _ = find_violation(CHECKED, num_workers=2, of="I2")
    assert len(checked) > len(simple)
