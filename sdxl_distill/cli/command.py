"""What a command is, and how one is run: parse its arguments, run it, map its errors.

A command is a module that is light to import: it imports torch, diffusers and the rest inside
`run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from sdxl_distill.errors import DistillError

# Importing torch makes half a million objects that are permanent; by default the collector walks
# through them after every 700 new ones, a sixth of the time until a command can begin.
_COLLECT_AFTER_OBJECTS = 10_000


class Command(Protocol):
    """What a module of a command offers."""

    @property
    def SUMMARY(self) -> str:  # noqa: N802 - a constant of the module
        """One line for the list of all commands."""
        ...

    @property
    def HELP(self) -> str:  # noqa: N802
        """What `--help` says above the arguments."""
        ...

    @property
    def INTERRUPTED(self) -> str:  # noqa: N802
        """What Ctrl-C leaves and what to do next: the end of a sentence."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        ...

    def run(self, arguments: argparse.Namespace) -> int | None:
        """Do the work and return the exit code, None for 0; `arguments.argv` is what was typed."""
        ...


def run_command(
    command: Command, argv: Sequence[str] | None = None, prog: str | None = None
) -> int:
    """Run one command; our own errors become a message and an exit code.

    Args:
        command: the module of the command.
        argv: its arguments; None takes those of the process.
        prog: the name that the user called it by.
    """
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    parser = argparse.ArgumentParser(
        prog=prog, description=command.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
    # The libraries would draw progress bars for files that are written in a moment.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _configure_output()
    try:
        return command.run(arguments) or 0
    except DistillError as error:
        say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"interrupted; {command.INTERRUPTED}")
        return 130


def say(message: str) -> None:
    """Print to stderr; be silent when its reader is gone, since Ctrl-C ended `| tee` too.

    What stdout still holds is then dropped, so that the exit code stays the command's.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            descriptor = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)


def _configure_output() -> None:
    """Log warnings of every process, but messages of the main one only; print any path at all."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("sdxl_distill").setLevel(logging.INFO if is_main else logging.WARNING)
