"""Main memory that a process may still take: by the kernel's count, and by its control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_distill.runtime.free_memory import free_memory

MEMINFO = "MemTotal:       32000 kB\nMemFree:         2000 kB\nMemAvailable:   10000 kB\n"
FREE = 10_000 << 10
V1 = "5:memory:/job\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, FREE),
        ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "5\n"}, FREE),
        ("0::/a\n", {"a/memory.max": "5000\n", "a/memory.current": "2000\n"}, 3000),
        ("0::/a/b\n", {"a/memory.max": "5000\n", "a/memory.current": "6000\n"}, 0),
        (
            "0::/a\n",
            {
                "a/memory.max": "5000\n",
                "a/memory.current": "4000\n",
                "a/memory.stat": "anon 1\ninactive_file 700\nactive_file 50\n",
            },
            1750,
        ),
        (
            V1,
            {
                "memory/job/memory.limit_in_bytes": "5000\n",
                "memory/job/memory.usage_in_bytes": "4000\n",
                "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
            },
            1500,
        ),
        (V1, {"memory/job/memory.limit_in_bytes": "9223372036854771712\n"}, FREE),
        ("0::/a\n", {"a/memory.max": "nonsense", "a/memory.current": "1"}, FREE),
    ],
)
def test_the_narrowest_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    for name, content in {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": content for name, content in files.items()},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert free_memory(tmp_path) == expected


def test_a_kernel_that_does_not_say_sets_no_limit(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None


def test_a_machine_that_runs_this_has_some() -> None:
    free = free_memory()
    assert free is not None
    assert 1 << 20 < free < 1 << 50
