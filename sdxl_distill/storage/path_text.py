"""What a path is: whether a text can be one at all, and where one leads."""

from __future__ import annotations

import os
from pathlib import Path

from sdxl_distill.errors import ConfigError
from sdxl_distill.limits import MAX_NAME_BYTES, MAX_PATH_BYTES


def fault_of_path(text: str) -> str | None:
    """Return what keeps a text from being a path; None when it can be one.

    Checked here, since the operating system's own answers differ from call to call.

    Names that are not UTF-8 are paths, as Python spells them on a command line (PEP 383).
    """
    if "\0" in text:
        return "it contains a NUL character"
    try:
        content = os.fsencode(text)
    except UnicodeEncodeError:
        return "it contains half of a surrogate pair"
    longest = max(map(len, content.split(b"/")))
    if longest > MAX_NAME_BYTES:
        return f"one of its names has {longest} bytes, and at most {MAX_NAME_BYTES} are possible"
    if len(content) > MAX_PATH_BYTES:
        return f"it has {len(content)} bytes, and at most {MAX_PATH_BYTES} are possible"
    return None


def require_path(path: str | Path) -> None:
    """Check that a text can be a path, before the operating system is asked.

    Raises:
        ConfigError: saying what keeps it from being one.
    """
    fault = fault_of_path(str(path))
    if fault is not None:
        where = str(path).encode(errors="backslashreplace").decode().replace("\0", "\\x00")
        raise ConfigError(f"this cannot be a path: {fault}", where=where, action="check the path")


def real_path(path: str | Path) -> Path:
    """Return a path without symbolic links, as far as it exists.

    This also takes a link to itself, for which `Path.resolve` raises RuntimeError: opening it
    raises an OSError.

    Raises:
        ValueError: when it cannot be a path.
    """
    return Path(os.path.realpath(path))
