"""The command line as the user typed it, with its launcher, where the system can tell.

On Linux a process can read its ancestors' words: `accelerate launch`, torchrun or `uv run` end with
those of the script that they start.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final

_MAX_ANCESTORS: Final = 4
# What the documentation tells users to set for one command.
_VARIABLES: Final = (
    "ACCELERATE_USE_CPU",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
)


def typed_command(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the words of the command that this process belongs to.

    Args:
        name: the command's name, `train`.
        arguments: the command's arguments; an ancestor counts only if its words end in them.
    """
    words = list(sys.orig_argv)
    if not arguments or words[-len(arguments) :] != list(arguments):
        return ["sdxl-distill", name, *arguments]
    variables: Mapping[str, str] = os.environ
    pid = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        found = _strings(pid, "cmdline")
        # It must name the script too: a wrapper of another command may have the same arguments.
        if found[-len(arguments) :] != list(arguments) or not _has_script(found, words):
            break
        words = found
        settings = (each.partition("=") for each in _strings(pid, "environ"))
        variables = {variable: value for variable, _, value in settings}
        pid = _parent(pid)
    set_here = [f"{each}={variables[each]}" for each in _VARIABLES if each in variables]
    return [*set_here, *_without_interpreter(words)]


def with_resume(words: Sequence[str]) -> list[str]:
    """Return the words of a `train` command that continues from its latest checkpoint."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, _ = word.partition("=")
        if len(option) >= len("--res") and "--resume".startswith(option):
            if not equals:
                next(rest, None)
        else:
            kept.append(word)
    return [*kept, "--resume", "latest"]


def as_text(words: Sequence[str]) -> str:
    """Return words as a shell reads them; assignments at the front stay assignments."""
    assignments = list(takewhile(lambda word: word.partition("=")[0] in _VARIABLES, words))
    pairs = (each.partition("=") for each in assignments)
    assigned = [f"{variable}={shlex.quote(value)}" for variable, _, value in pairs]
    return " ".join([*assigned, shlex.join(words[len(assignments) :])])


def _has_script(found: Sequence[str], words: Sequence[str]) -> bool:
    scripts = {Path(word).name for word in words if not word.startswith("-")}
    return any(Path(word).name in scripts for word in found)


def _strings(pid: int, file: str) -> list[str]:
    """Return the zero-terminated strings that /proc has of a process; none if it has none."""
    try:
        content = Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(each) for each in content.split(b"\0")[:-1]]


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _without_interpreter(words: Sequence[str]) -> list[str]:
    """Return `accelerate …` for the `python /…/bin/accelerate …` that its first line runs."""
    if len(words) > 1 and Path(words[0]).name.startswith("python"):
        script = Path(words[1])
        if script.is_absolute() and script.parent == Path(words[0]).parent:
            is_found = shutil.which(script.name) == str(script)
            return [script.name if is_found else str(script), *words[2:]]
    return list(words)
