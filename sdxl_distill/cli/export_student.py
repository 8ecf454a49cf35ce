"""`export-student`: a checkpoint of a run becomes a diffusers folder."""

from __future__ import annotations

import argparse

from sdxl_distill.cli.arguments import add_config_arguments, config_of, path_argument

SUMMARY = "write a trained student as a diffusers folder"
HELP = """Write a trained student as a complete diffusers folder.

StableDiffusionXLPipeline.from_pretrained loads it. train does the same at its end; use this for
another checkpoint, dtype (--set export.dtype=fp32) or the weights without averaging."""
INTERRUPTED = "nothing was exported, run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="latest|PATH",
        type=path_argument,
        default="latest",
        help="which checkpoint of the run (default: the newest)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="moving average or the weights themselves (default: ema when the run kept it)",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=path_argument, help="new folder (default: {run}/export)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(arguments: argparse.Namespace) -> None:
    """Export."""
    from pathlib import Path

    from sdxl_distill.config.distill import DistillConfig

    config = config_of(arguments, DistillConfig)
    if config is None:
        return
    from sdxl_distill.export.diffusers_folder import use_of
    from sdxl_distill.export.student import export_student

    destination = export_student(
        config,
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
        destination=Path(arguments.output) if arguments.output else None,
        overwrite=arguments.overwrite,
    )
    print(f"exported to {destination}\n\n{use_of(destination)}")
