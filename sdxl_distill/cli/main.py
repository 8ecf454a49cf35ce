"""`sdxl-distill COMMAND` and the scripts in tools/: find the command, run it, map its errors.

A command module has `HELP`, `add_arguments(parser)` and `run(arguments)`; it imports torch,
diffusers and the rest inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from sdxl_distill.errors import DistillError

COMMANDS = {
    "build-latents": "encode a folder of images into the latents set",
    "build-text": "encode the captions of a latents set with one pair of text encoders",
    "build-shards": "run one teacher over the latents set and write its predictions set",
    "verify-shards": "prove that a shard set is complete and valid",
    "pack-shards": "turn a loose folder of records into a shard set",
    "unpack-shards": "turn a shard set into a loose folder of records",
    "train": "train the student on the joined sets of all teachers",
    "export-student": "write a trained student as a diffusers folder",
    "demo": "run everything on a tiny SDXL family and real photos, on a laptop CPU",
}

_INTERRUPTED_BUILDER = "committed work is kept, run the command again"
_INTERRUPTED = {
    "verify-shards": "nothing was changed, run the command again",
    "pack-shards": "remove the unfinished output folder and run the command again",
    "unpack-shards": "remove the unfinished output folder and run the command again",
    "train": "it had not begun, run the command again",  # later it has words of its own
    "export-student": "nothing was exported, run the command again",
    "demo": "run the command again, which starts from the beginning",
}

# Importing torch makes half a million objects that live for ever; by default the collector walks
# through them after each 700, a sixth of the time until a command can begin.
_COLLECT_AFTER_OBJECTS = 10_000


class Command(Protocol):
    """What a module of a command offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        ...

    def run(self, arguments: argparse.Namespace) -> int | None:
        """Do the work; the exit code, None for 0. `arguments.argv` is what was typed."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run_command(argv[0], argv[1:], prog=f"sdxl-distill {argv[0]}")
    parser = argparse.ArgumentParser(
        prog="sdxl-distill",
        description="Distil several fine-tuned SDXL checkpoints into one student.",
        epilog="`sdxl-distill COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    parser.parse_args(argv)
    raise AssertionError("argparse exits on an unknown command")


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command; errors of ours become a message and their exit code.

    Args:
        name: one of `COMMANDS`.
        argv: its arguments; None: those of the process.
        prog: how the user called it.
    """
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    command = cast("Command", importlib.import_module(f"sdxl_distill.cli.{name.replace('-', '_')}"))
    parser = argparse.ArgumentParser(
        prog=prog, description=command.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
    # The libraries draw bars of their own for files that are written in a moment.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _configure_output()
    try:
        return command.run(arguments) or 0
    except DistillError as error:
        say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"interrupted; {_INTERRUPTED.get(name, _INTERRUPTED_BUILDER)}")
        return 130


def say(message: str) -> None:
    """Print to stderr; when nobody reads it any more, since Ctrl-C ended `| tee` too, be silent.

    What stdout still holds goes nowhere then, so that the exit code stays the command's.
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
    """Log warnings of every process, but messages of the main one only; print any path."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("sdxl_distill").setLevel(logging.INFO if is_main else logging.WARNING)
