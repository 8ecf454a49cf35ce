"""`build-shards`: one teacher's predictions for every image and draw."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sdxl_distill.cli.arguments import add_config_arguments, config_of
from sdxl_distill.cli.dry_run import add_dry_run_arguments, is_dry_run, print_build_estimate

if TYPE_CHECKING:
    from sdxl_distill.storage.location import Location

SUMMARY = "run one teacher over the latents set and write its predictions set"
HELP = """Run one teacher over the latents set and write its predictions set.

Run it once for every teacher, on as many GPUs and nodes as there are:
  accelerate launch tools/build_shards.py --config C
Kill it whenever you like: the same command picks up where it left off."""
INTERRUPTED = "committed work is kept, run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser)
    present = parser.add_mutually_exclusive_group()
    present.add_argument(
        "--repair",
        action="store_true",
        help="read the whole set; keep its good shards and rebuild damaged and stale ones",
    )
    present.add_argument(
        "--withdraw-only",
        action="store_true",
        help="set the present set aside for cache.skip_existing: false and stop; run it once "
        "before a job array, whose tasks cannot agree on it",
    )
    add_dry_run_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Build the set."""
    from sdxl_distill.config.builder import BuilderConfig
    from sdxl_distill.storage.location import Location

    config = config_of(arguments, BuilderConfig)
    if config is None:
        return
    if is_dry_run(arguments):
        print_build_estimate(config, arguments)
        return
    location = Location(config.cache.output_dir) / config.teacher.teacher_id
    if arguments.withdraw_only:
        _withdraw(location)
        return
    from sdxl_distill.builder.launch import Launch
    from sdxl_distill.cli.build_summary import print_build_summary
    from sdxl_distill.runtime.world import World
    from sdxl_distill.sets.predictions_set import build_predictions_set

    world = World.from_environment()
    done = build_predictions_set(config, Launch(world), repair=arguments.repair)
    if world.is_main:
        print_build_summary(done.text_location, done.text)
        print_build_summary(location, done.predictions)


def _withdraw(location: Location) -> None:
    from sdxl_distill.builder.withdrawal import is_withdrawn, withdraw_set
    from sdxl_distill.runtime.world import World

    if not World.from_environment().is_main:
        return
    if is_withdrawn(location):
        print(f"{location} was set aside before, and its replacement is not complete yet")
        return
    existed = location.exists()
    aside = withdraw_set(location)
    if existed:
        print(
            f"{location} was set aside as {aside}, which is deleted when the next build is complete"
        )
    else:
        print(f"there is no set at {location}: the next build will create it")
