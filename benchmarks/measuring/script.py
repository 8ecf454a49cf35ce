"""A benchmark run by itself: `python benchmarks/join.py [--small]` prints its table.

`run.py` runs every one so, in a process of its own, and has it write what it found to a file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from measuring.machine import machine, versions
from measuring.row import Curve, Row, table

Measure: TypeAlias = Callable[[bool], Iterator[Row | Curve]]
"""What each benchmark calls `measure`: takes whether sizes shall be small, yields what it found."""


def run_alone(measure: Measure) -> None:
    """Run one benchmark as a command."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--small", action="store_true", help="sizes of a test: numbers say nothing")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    arguments = parser.parse_args()
    print(heading(), end="\n\n", flush=True)
    found = list(measure(arguments.small))
    rows = [each for each in found if isinstance(each, Row)]
    print(table(rows), flush=True)
    if arguments.json is not None:
        curves = [each for each in found if isinstance(each, Curve)]
        arguments.json.write_text(json.dumps(to_json(rows, curves)), "utf-8")


def heading() -> str:
    """Return a line about the machine and one about the versions."""
    lines = [machine(), versions()]
    return "\n".join(", ".join(f"{name} {text}" for name, text in line.items()) for line in lines)


def to_json(rows: list[Row], curves: list[Curve]) -> dict[str, Any]:
    """Return what one benchmark found as JSON values."""
    return {
        "rows": [row.to_json() for row in rows],
        "curves": [curve.to_json() for curve in curves],
    }
