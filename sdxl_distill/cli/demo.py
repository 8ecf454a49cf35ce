"""`demo`: everything, with real processes, on a tiny SDXL family and real photos."""

from __future__ import annotations

import argparse

from sdxl_distill.cli.arguments import path_argument

SUMMARY = "run everything on a tiny SDXL family and real photos, on a laptop CPU"
HELP = """Run the whole job on a laptop CPU: photos, a tiny SDXL family and three teachers
fine-tuned from it, latents, predictions, verification, training on two processes, export, and
the proof on held-out photos. Takes about five minutes on two cores; nothing is downloaded."""
INTERRUPTED = "run the command again; it starts from the beginning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=path_argument,
        default="demo_output",
        help="where everything goes; an earlier demo there is replaced (default: demo_output)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 1 when the student is not close enough to its teachers."""
    from pathlib import Path

    from sdxl_distill.demo.run import run_demo

    return 0 if run_demo(Path(arguments.output)).has_distilled else 1
