"""Runs every benchmark, writes results/latest.json and from it docs/performance.md.

`python benchmarks/run.py [--only NAME…] [--small]`; with one of these nothing is written but the
tables on the screen, unless `--results FILE` names another place.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from measuring.machine import machine, versions
from measuring.page import write_page
from measuring.row import Row

FOLDER: Final = Path(__file__).parent
LATEST: Final = FOLDER / "results/latest.json"
BENCHMARKS: Final = (
    "join",
    "many_shards",
    "against_peers",
    "first_batch",
    "schedule",
    "writing",
    "bytes_per_image",
    "builders",
    "trainer",
    "memory",
    "fixed_cost",
    "gpu",
)


def main() -> None:
    """Run the benchmarks that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--small", action="store_true", help="sizes of a test: numbers say nothing")
    parser.add_argument("--results", type=Path, help="where to write what was found, as JSON")
    arguments = parser.parse_args()
    is_whole = arguments.only == BENCHMARKS and not arguments.small
    target = arguments.results or (LATEST if is_whole else None)
    found = run(arguments.only, small=arguments.small)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if target == LATEST:
        write_page(found, FOLDER.parent / "docs")


def run(names: tuple[str, ...] | list[str], *, small: bool) -> dict[str, Any]:
    """Return machine, versions, and the rows and curves of some benchmarks."""
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "rows": [], "curves": []}
    start = time.monotonic()
    for name in names:
        print(f"\n# {name}", flush=True)
        own = _run_one(name, small=small)
        for row in own["rows"]:
            found["rows"].append({**row, "metric": f"{name}: {row['metric']}"})
        found["curves"] += own["curves"]
    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(names)} benchmarks in {minutes:.1f} minutes")
    return found


def _run_one(name: str, *, small: bool) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, FOLDER / f"{name}.py", "--json", file.name]
        done = subprocess.run([*command, *["--small"] * small], check=False)
        if done.returncode:
            row = Row.missing("everything", "", f"ended with exit code {done.returncode}")
            return {"rows": [row.to_json()], "curves": []}
        return json.loads(Path(file.name).read_text("utf-8"))


if __name__ == "__main__":
    main()
