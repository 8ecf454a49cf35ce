"""`build-text`: the captions of a latents set, encoded by one pair of text encoders."""

from __future__ import annotations

import argparse

from sdxl_distill.cli.arguments import add_config_arguments, config_of

SUMMARY = "encode the captions of a latents set with one pair of text encoders"
HELP = """Encode the captions of the latents set into a text set.

build-shards does this by itself for the encoders of its configuration. Use this command for a
student with other text encoders:
  sdxl-distill build-text --config C --set model.text_encoder_id=STUDENT"""
INTERRUPTED = "committed work is kept, run the command again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="read the whole set; keep its good shards and rebuild damaged and stale ones",
    )


def run(arguments: argparse.Namespace) -> None:
    """Build the set."""
    from sdxl_distill.config.builder import BuilderConfig

    config = config_of(arguments, BuilderConfig)
    if config is None:
        return
    from sdxl_distill.builder.launch import Launch
    from sdxl_distill.cli.build_summary import print_build_summary
    from sdxl_distill.runtime.world import World
    from sdxl_distill.sets.predictions_set import open_latents
    from sdxl_distill.sets.text_set import build_text_set

    world = World.from_environment()
    location, built = build_text_set(
        config, open_latents(config), Launch(world), repair=arguments.repair
    )
    if world.is_main:
        print_build_summary(location, built)
