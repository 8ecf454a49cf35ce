"""`sdxl-distill COMMAND`: find the command that the first argument names, and run it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sdxl_distill.cli import (
    build_latents,
    build_shards,
    build_text,
    demo,
    export_student,
    pack_shards,
    train,
    unpack_shards,
    verify_shards,
)
from sdxl_distill.cli.command import Command, run_command

COMMANDS: dict[str, Command] = {
    "build-latents": build_latents,
    "build-text": build_text,
    "build-shards": build_shards,
    "verify-shards": verify_shards,
    "pack-shards": pack_shards,
    "unpack-shards": unpack_shards,
    "train": train,
    "export-student": export_student,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run_command(COMMANDS[argv[0]], argv[1:], prog=f"sdxl-distill {argv[0]}")
    parser = argparse.ArgumentParser(
        prog="sdxl-distill",
        description="Distil several fine-tuned SDXL checkpoints into one student.",
        epilog="`sdxl-distill COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.SUMMARY, add_help=False)
    parser.parse_args(argv)
    raise AssertionError("argparse exits on an unknown command")
