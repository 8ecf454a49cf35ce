"""What `make mutants` changes and what it leaves alone."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MUTANTS = runpy.run_path(str(Path(__file__).parent / "mutants.py"))["mutants"]


def changes(source: str) -> list[str]:
    return [mutant.change for mutant in MUTANTS(source.encode())]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("os.fsync(3)", ["os.fsync(3) → pass", "3 → 4"]),
        ("self.sum += n", ["self.sum += n → pass"]),
        ("self.kept = kept", ["self.kept = kept → pass"]),
        ("kept = n", []),
        ("raise Fault('why')", ["raise Fault('why') → pass"]),
        ("a <= b", ["a <= b → pass", "a <= b → a < b"]),
        ("a in b and not c", ["a in b and (not c) → pass", "a in b and (not c) → a in b or not c",
                              "a in b → a not in b", "not c → c"]),
        ("if ready: x = a - b", ["ready → not ready", "a - b → a + b"]),
        ("x = f(name='n', strict=True)", ["f(name='n', strict=True) → f(strict=True)",
                                          "'n' → 'n~'"]),
        ("x = True, 'é', 1.5", ["True → False", "'é' → 'é~'", "1.5 → 2.5"]),
        ("x = f'{a}.tar'", ["f'{a}.tar' → f'{a}.tar~'"]),
    ],
)  # fmt: skip
def test_each_kind_of_change_is_made(source: str, expected: list[str]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "def f(a: 'int | None') -> 'str': ...",
        "x: Literal['a', 'b']",
        "Kind = Literal['a', 'b']",
        "kept = cast('list[Any]', value)",
        "@cached(3)\ndef f(): ...",
        "assert a < b, 'never'",
        "x = 'a text for people'",
        "if TYPE_CHECKING:\n    f(1)",
    ],
)
def test_what_does_not_run_and_messages_are_left_alone(source: str) -> None:
    assert [change for change in changes(source) if not change.startswith("... ")] == []


def test_a_mutant_is_the_module_but_for_one_change_at_its_line() -> None:
    source = "def f(a):\n    é = 'x', a + 1  # why\n    return é\n"
    by_change = {mutant.change: mutant for mutant in MUTANTS(source.encode())}
    changed = by_change["a + 1 → a - 1"]
    assert changed.line == 2
    assert changed.source.decode() == source.replace("a + 1", "(a - 1)")


@pytest.mark.parametrize("path", sorted((ROOT / "sdxl_distill/core").glob("*.py")), ids=str)
def test_every_mutant_of_a_module_can_be_parsed(path: Path) -> None:
    for mutant in MUTANTS(path.read_bytes()):
        ast.parse(mutant.source)
