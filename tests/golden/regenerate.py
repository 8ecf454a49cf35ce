"""Rebuilds every golden file, `NAME.json` from `build()` in `NAME.py`, and says which changed.

A changed golden file is a breaking change: it needs a line in CHANGELOG.md (CONTRIBUTING.md).
`python tests/golden/regenerate.py [NAME…]` rebuilds all, or those that are named.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent


def builders() -> dict[str, Path]:
    """Return the name of every golden file and the script that builds it."""
    scripts = {path.stem: path for path in sorted(GOLDEN.glob("*.py"))}
    del scripts[Path(__file__).stem]
    return scripts


def regenerate(name: str) -> bool:
    """Rebuild one golden file; return whether its content changed."""
    file = GOLDEN / f"{name}.json"
    built = runpy.run_path(str(builders()[name]))["build"]()
    changed = not file.exists() or json.loads(file.read_text("utf-8")) != built
    file.write_text(json.dumps(built, indent=2, sort_keys=True) + "\n", "utf-8")
    return changed


def main() -> None:
    """Rebuild what the command line names, or everything."""
    for name in sys.argv[1:] or builders():
        print(f"{name}: {'changed' if regenerate(name) else 'as it was'}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # the suite's own; another count gives other bits
    main()
