"""`train`: the student learns the weighted average of all teachers' predictions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sdxl_distill.cli.arguments import add_config_arguments, config_of, path_argument
from sdxl_distill.cli.dry_run import add_dry_run_arguments, is_dry_run, print_training_estimate

if TYPE_CHECKING:
    from sdxl_distill.cli.early_end import EarlyEnd
    from sdxl_distill.config.distill import DistillConfig

SUMMARY = "train the student on the joined sets of all teachers"
HELP = """Train the student on the joined shard sets of all teachers, then export it.

On any number of processes and nodes: accelerate launch train.py --config C
Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint at the next step, exit with 75 and print the command
that continues, bit for bit as if nothing had happened. A second Ctrl-C ends at once, unsaved."""
INTERRUPTED = "it had not begun, run the command again"  # once it has begun, early_end says more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="latest|PATH",
        type=path_argument,
        help="continue from the newest checkpoint of the run (from the start if there is none), "
        "or from the one in the folder PATH",
    )
    parser.add_argument("--no-export", action="store_true", help="do not export the student")
    add_dry_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int | None:
    """Train and export."""
    from sdxl_distill.config.distill import DistillConfig

    config = config_of(arguments, DistillConfig)
    if config is None:
        return None
    if is_dry_run(arguments):
        print_training_estimate(config, arguments)
        return None
    from sdxl_distill.cli.early_end import EarlyEnd

    with EarlyEnd(config, arguments.argv) as end:
        _train(config, arguments, end)
    return end.exit_code


def _train(config: DistillConfig, arguments: argparse.Namespace, end: EarlyEnd) -> None:
    from sdxl_distill.runtime.world import World
    from sdxl_distill.train.run_folder import RunFolder
    from sdxl_distill.train.session import train_student

    is_main = World.from_environment().is_main
    if is_main:
        path = RunFolder.of(config).path
        print(f"run folder: {path} (its config.json is the resolved configuration)")
        print(f"logs: tensorboard --logdir {config.training.tensorboard.base_dir}")
    if not arguments.no_export:
        from sdxl_distill.export.student import require_exportable

        require_exportable(config)
    summary = train_student(config, arguments.resume, end.signals)
    end.is_trained = True
    if not is_main:
        return
    print(f"{config.run.name}: {summary.global_step} steps, {summary.seconds:.1f} s in this run")
    for tag, value in sorted(summary.losses.items()):
        print(f"  {tag}: {value:.6g}")
    if not arguments.no_export:
        from sdxl_distill.export.diffusers_folder import use_of
        from sdxl_distill.export.student import export_student

        end.signals.check()
        destination = export_student(config, overwrite=True)
        print(f"exported to {destination}\n\n{use_of(destination)}")
