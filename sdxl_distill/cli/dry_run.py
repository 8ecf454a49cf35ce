"""`--dry-run`: what a configuration will take, printed instead of done."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from sdxl_distill.cli.build_summary import format_bytes
from sdxl_distill.errors import ConfigError

if TYPE_CHECKING:
    from sdxl_distill.config.builder import BuilderConfig
    from sdxl_distill.config.distill import DistillConfig
    from sdxl_distill.core.bucket import Bucket
    from sdxl_distill.estimate.set_size import SetSize

_BESIDES = "the CUDA context and the allocator take another 1 to 2 GB"


def add_dry_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--dry-run`, `--rate` and `--measure`."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory, disk and time that this configuration will take, and stop",
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--rate",
        metavar="N",
        type=float,
        help="with --dry-run: records per second of all processes together, for the hours",
    )
    rate.add_argument(
        "--measure",
        action="store_true",
        help="with --dry-run: load the model and time some batches on this machine's device",
    )


def is_dry_run(arguments: argparse.Namespace) -> bool:
    """Whether nothing but an estimate is wanted.

    Raises:
        ConfigError: for an option that needs --dry-run.
    """
    if arguments.dry_run:
        return True
    if arguments.rate is not None or arguments.measure:
        raise ConfigError(
            "--rate or --measure without --dry-run",
            where="command line",
            action="add --dry-run: a real run measures its rate by itself",
        )
    return False


def print_build_estimate(config: BuilderConfig, arguments: argparse.Namespace) -> None:
    """Print what `build-shards` will take.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `estimate.build.estimate_predictions`.
    """
    from sdxl_distill.estimate.build import estimate_predictions
    from sdxl_distill.estimate.rate import measure_build_rate
    from sdxl_distill.runtime.world import World

    # What is to be done.
    estimate = estimate_predictions(config)
    shards, draws = estimate.predictions.num_shards, config.cache.draws
    print(f"dry run of build-shards for {config.teacher.teacher_id}; nothing is built")
    if not estimate.has_latents:
        print("  there are no latents yet: every image file counts, in the largest bucket")
    if estimate.num_without_caption:
        print(f"  captions:  {estimate.num_without_caption:,} images have none in a file or line")
    print(f"  images:    {estimate.text.num_records:,}, draws of each: {draws:,}")
    print(f"  shards:    {shards:,}, of which {estimate.num_existing_shards:,} are there")
    print(f"  forwards:  {estimate.num_forwards:,} to do, {config.cache.batch_size} at once")
    # Disk, memory, hours.
    latents = "there" if estimate.has_latents else "to be built, about"
    _print_size("this teacher", estimate.predictions)
    _print_size("text, shared by all teachers with these encoders", estimate.text)
    _print_size(f"latents, shared by all teachers; {latents}", estimate.latents)
    memory = estimate.memory
    print(
        f"  memory:    {format_bytes(memory.peak_bytes)} on the device: weights "
        f"{format_bytes(memory.weights_bytes)}, activations "
        f"{format_bytes(memory.activations_bytes)} at {_size(estimate.bucket)}"
    )
    print(
        f"             (before that, text encoders: {format_bytes(estimate.text_encoder_bytes)}); "
        f"{_BESIDES}"
    )
    rate = arguments.rate
    if arguments.measure:
        rate = measure_build_rate(config, estimate.bucket) * World.from_environment().size
    _print_hours(estimate.num_forwards, rate)


def print_training_estimate(config: DistillConfig, arguments: argparse.Namespace) -> None:
    """Print what `train` will take.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `estimate.training.estimate_training`.
    """
    from sdxl_distill.estimate.rate import measure_training_rate
    from sdxl_distill.estimate.training import estimate_training
    from sdxl_distill.runtime.world import World

    # Steps, and the sets that they read.
    num_processes = World.from_environment().size
    estimate = estimate_training(config, num_processes)
    training, memory = config.training, estimate.memory
    print(f"dry run of train for {config.run.name}; nothing is trained")
    print(
        f"  steps:     {training.num_steps:,} of {estimate.num_records // training.num_steps:,} "
        f"records (processes: {num_processes}): {estimate.num_records:,} records, each with a "
        "forward and a backward pass"
        + (" and a second forward" if config.student.use_gradient_checkpointing else "")
    )
    if estimate.num_epochs is None:
        print("  sets:      not all teachers' sets are there")
    else:
        print(
            f"  sets:      {estimate.num_images:,} images, {estimate.num_epochs:.2f} epochs; "
            f"{len(config.teachers)} teachers in {estimate.num_shards:,} shards, "
            f"{format_bytes(estimate.read_bytes)}"
        )
    # Memory, disk, hours.
    print(
        f"  memory:    {format_bytes(memory.peak)} on the device of each process: weights "
        f"{format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, activations "
        f"{format_bytes(memory.activations)} at {_size(estimate.bucket)}, optimizer "
        f"{format_bytes(memory.optimizer)}"
    )
    print(f"             {_BESIDES}")
    if memory.ema:
        place = "on the device, counted above" if memory.ema_on_device else "in main memory"
        print(f"  average:   {format_bytes(memory.ema)} of each process {place}")
    print(
        f"  disk:      {estimate.num_checkpoints} checkpoints of "
        f"{format_bytes(estimate.checkpoint_bytes)} while the last is written; export "
        f"{format_bytes(estimate.export_bytes)} and the other networks"
    )
    rate = arguments.rate
    if arguments.measure:
        rate = measure_training_rate(config, estimate.bucket) * num_processes
    _print_hours(estimate.num_records, rate)


def _print_size(meaning: str, size: SetSize) -> None:
    print(f"  disk:      {format_bytes(size.num_bytes):>9} {meaning}")


def _print_hours(num_records: int, rate: float | None) -> None:
    if rate is None:
        print("  time:      give --rate N, or time this machine with --measure")
    elif not 0 < rate < math.inf:
        raise ConfigError(f"--rate {rate:g}", expected="a number above 0", where="command line")
    else:
        print(f"  time:      {num_records / rate / 3600:.2f} hours at {rate:.4g} records/s")


def _size(bucket: Bucket) -> str:
    return f"{bucket.width}x{bucket.height}"
