"""The control groups above this process: what a container or a scheduler lets it have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path, mounts: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, from the outermost on.

    A line of `/proc/self/cgroup` is `id:controllers:path`; without controllers it is version 2
    (https://docs.kernel.org/admin-guide/cgroup-v2.html). In a container the path may be
    the host's, of which only the mounted end exists: some of the folders may be missing.

    Args:
        controller: the controller, such as "cpu".
        root: the folder that holds `proc` and `sys`.
        mounts: other names that version 1 mounts the controller by.
    """
    for line in lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        places = (controllers, controller, *mounts) if controllers else ("", "unified")
        for place in dict.fromkeys(places):
            group = root / "sys/fs/cgroup" / place
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                yield group.joinpath(*parts[:depth])


def lines(path: Path) -> list[str]:
    """Return the lines of a kernel's file; none where it cannot be read."""
    try:
        return path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
