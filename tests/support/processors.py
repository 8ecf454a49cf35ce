"""Run what compares floats, `pytest -m processors`, as other processors would compute it.

`make test-processors` calls this. Each setting holds a library below what the machine can do; who
cannot do what a setting asks for computes as it does anyway. Arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
SETTINGS: Final[Mapping[str, Mapping[str, str]]] = {
    "as it is": {},
    "SSE4.1": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX-512 with bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


def run_tests(
    setting: str, arguments: Sequence[str], *, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pytest as a process under one setting; with `quiet` its output is only returned."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | SETTINGS[setting],
        check=False,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )


def main() -> int:
    """Run all settings and say which failed."""
    failed: list[str] = []
    for setting in SETTINGS:
        print(f"== {setting}", flush=True)
        arguments = ["-q", "--durations=0", "--durations-min=30", "-m", "processors"]
        if run_tests(setting, [*arguments, *sys.argv[1:]]).returncode:
            failed.append(setting)
    print(f"failed: {', '.join(failed)}" if failed else "passed under every setting")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
