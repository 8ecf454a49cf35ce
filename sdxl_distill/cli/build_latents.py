"""`build-latents`: a folder of images and captions becomes the latents set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sdxl_distill.cli.arguments import add_config_arguments, config_of

if TYPE_CHECKING:
    from sdxl_distill.catalog.scan import Progress

SUMMARY = "encode a folder of images into the latents set"
HELP = """Encode a folder of images into the latents set that all teachers and the trainer read.

Run it again after adding images: new ones go to new shards, the others stay as they are.
Any number of processes share the work: accelerate launch tools/build_latents.py --config C"""
INTERRUPTED = "committed work is kept, run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument("--rescan", action="store_true", help="read every image again")
    present = parser.add_mutually_exclusive_group()
    present.add_argument(
        "--rebuild", action="store_true", help="set the present latents aside and start over"
    )
    present.add_argument(
        "--repair",
        action="store_true",
        help="read the whole set; keep its good shards and rebuild damaged ones",
    )


def run(arguments: argparse.Namespace) -> None:
    """Build the set."""
    from sdxl_distill.config.builder import BuilderConfig

    config = config_of(arguments, BuilderConfig)
    if config is None:
        return
    from sdxl_distill.builder.launch import Launch
    from sdxl_distill.cli.build_summary import print_build_summary, print_scan_report
    from sdxl_distill.runtime.world import World
    from sdxl_distill.sets.latents_set import build_latents_set

    launch = Launch(World.from_environment())
    done = build_latents_set(
        config,
        launch,
        rebuild=arguments.rebuild,
        repair=arguments.repair,
        rescan=arguments.rescan,
        scan_progress=_scan_progress(),
    )
    if done.report is not None:
        print_scan_report(done.report, done.built.manifest.undecodable)
        print_build_summary(config.data.latent_cache.cache_dir, done.built)


def _scan_progress() -> Progress:
    from tqdm import tqdm

    bar = tqdm(desc="scan", unit="file", delay=1)

    def show(num_done: int, num_files: int) -> None:
        bar.total = num_files
        bar.update(num_done - bar.n)
        if num_done == num_files:
            bar.close()

    return show
