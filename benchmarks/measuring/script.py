"""A benchmark run by itself: `python benchmarks/join.py [--small]` prints its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TypeAlias

from measuring.machine import machine, versions
from measuring.row import Curve, Row, table

Measure: TypeAlias = Callable[[bool], Iterator[Row | Curve]]
"""What each benchmark calls `measure`: takes whether sizes shall be small, yields what it found."""


def run_alone(measure: Measure) -> None:
    """Run one benchmark as a command."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--small", action="store_true", help="sizes of a test: numbers say nothing")
    arguments = parser.parse_args()
    print(heading(), end="\n\n", flush=True)
    print(table(found for found in measure(arguments.small) if isinstance(found, Row)))


def heading() -> str:
    """Return a line about the machine and one about the versions."""
    lines = [machine(), versions()]
    return "\n".join(", ".join(f"{name} {text}" for name, text in line.items()) for line in lines)
