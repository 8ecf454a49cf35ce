"""Places and users that are refused hard links: real ones where possible, else as they behave."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from sdxl_distill.storage import publication

_NOBODY = 65_534
_IMAGE_BYTES = 64 << 20


class Linkless(NamedTuple):
    """A folder in a place without hard links.

    Attributes:
        path: the folder.
        limits: what a process must take on itself there; nothing on a real file system.
        is_real: whether it is one.
    """

    path: Path
    limits: Callable[[], None]
    is_real: bool


def take_as_it_is() -> None:
    """Change nothing: the file system is a real one."""


def refuse_links() -> None:
    """Answer every hard link in this process as vfat does."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    os.link = refuse


def refuse_links_and_flags() -> None:
    """Answer links and the flags of `renameat2` in this process as exFAT through FUSE does."""

    def refuse(directory: int, _source: str, target: str, _flag: int) -> None:
        # The kernel looks at the target's name before it asks the file system.
        exists = target in os.listdir(directory)
        number = errno.EEXIST if exists and _flag == 1 else errno.EINVAL
        raise OSError(number, os.strerror(number))

    refuse_links()
    publication._renameat2 = refuse


@contextmanager
def another_user() -> Iterator[None]:
    """Be a user who owns nothing here; without root's rights, one whose links are refused."""
    protected = Path("/proc/sys/fs/protected_hardlinks")
    if os.geteuid() or not protected.exists() or protected.read_text().strip() != "1":
        refuse_links()
        yield
        return
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def place_without_create_only_names(folder: Path) -> Iterator[Linkless]:
    """Give a file system that can neither link nor rename without replacing: exFAT by FUSE."""
    mounted = _mounted(folder, ["mkfs.exfat"], ["mount.exfat-fuse"])
    if mounted is None:
        yield Linkless(_own_folder(folder), refuse_links_and_flags, is_real=False)
        return
    with mounted as path:
        yield Linkless(path, take_as_it_is, is_real=True)


@contextmanager
def place_without_links(folder: Path) -> Iterator[Linkless]:
    """Give a file system that renames without replacing but does not link: vfat."""
    mounted = _mounted(folder, ["mkfs.vfat"], ["mount", "-t", "vfat"])
    if mounted is None:
        yield Linkless(_own_folder(folder), refuse_links, is_real=False)
        return
    with mounted as path:
        yield Linkless(path, take_as_it_is, is_real=True)


def _own_folder(folder: Path) -> Path:
    """Make a folder that nothing else lies in, as a mounted file system is."""
    own = folder / "unmounted"
    own.mkdir()
    return own


def _mounted(
    folder: Path, make: Sequence[str], mount: Sequence[str]
) -> AbstractContextManager[Path] | None:
    """Mount a new file system; None where a tool, the right or the kernel's driver is missing."""
    tools = [make[0], mount[0], "losetup", "umount"]
    if os.geteuid() or not all(map(shutil.which, tools)):
        return None
    image, point = folder / "image", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    point.mkdir()
    loop = _answer("losetup", "-f", "--show", str(image))
    if loop is None:
        return None
    if _answer(*make, loop) is None or _answer(*mount, loop, str(point)) is None:
        _answer("losetup", "-d", loop)
        return None

    @contextmanager
    def unmounting() -> Iterator[Path]:
        try:
            yield point
        finally:
            _answer("umount", "--lazy", str(point))
            _answer("losetup", "-d", loop)

    return unmounting()


def _answer(*command: str) -> str | None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()
