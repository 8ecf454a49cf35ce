"""Runs every benchmark of this folder in turn, below a line with machine and versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

VERSIONS = ("torch", "numpy", "webdataset", "safetensors")


def main() -> None:
    """Print where the numbers come from, then let each benchmark print its table."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(versions, flush=True)
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.name != Path(__file__).name:
            print(f"\n{script.stem}", flush=True)
            subprocess.run([sys.executable, script], check=True)


if __name__ == "__main__":
    main()
