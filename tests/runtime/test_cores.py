"""Cores that a process may use: by affinity, and by the quotas of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_distill.runtime.cores import available_cores

V1 = "4:cpu,cpuacct:/job\n3:memory:/job\n0::/"
MANY = 64
PERIOD = {"cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(MANY)))


def _root(tmp_path: Path, cgroup: str, files: dict[str, str]) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"cpu.max": "50000 100000\n"}, 1),  # in a container a and b are the host's
        ("0::/../x\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, MANY),
        ("0::/\n", {"unified/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "nonsense"}, MANY),
        ("0::/\n", {"cpu.max": "1 0"}, MANY),
        ("0::/\n", {"cpu.max": "9900000 100000"}, MANY),
        (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n", **PERIOD}, 3),
        (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n", **PERIOD}, MANY),
        ("", {}, MANY),
    ],
)
def test_the_smallest_quota_on_the_way_up_counts(tmp_path, cgroup, files, cores) -> None:
    assert available_cores(_root(tmp_path, cgroup, files)) == cores


def test_a_process_that_is_pinned_has_the_cores_it_is_pinned_to() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from sdxl_distill.runtime.cores import available_cores; print(available_cores())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "1\n"
