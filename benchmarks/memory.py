"""Memory: SDXL's on a device, counted without one; and main memory over long runs, which is flat.

Counts are of the real SDXL's published configuration at 1024², batch 4, bfloat16, gradient
checkpointing, 8-bit states, the average on the CPU. GB are 10⁹ bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from measuring.many_records import ManyRecords
from measuring.rounds import Sample
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sdxl import NUM_TOKENS, SDXL, SQUARE
from measuring.sets import write_sets
from measuring.tiny_job import TinyJob

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.demo.family import one_thread
from sdxl_distill.estimate.network_memory import counted_memory, prediction_memory
from sdxl_distill.estimate.training import batch_of_zeros, step_of, training_memory
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import UnetInput, unet_geometry
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.stream.loader import JoinedStream

BATCH: Final = 4
BUILD_GB: Final = 12.0
TRAIN_GB: Final = 20.0
GROWTH_MIB: Final = 16.0
WARM_UP: Final = 10
"""One in so many of a long run's steps come before the growth is counted."""


def measure(small: bool) -> Iterator[Row | Curve]:
    """Count building and training, and the loss of many teachers; run long and look at RSS."""
    sdxl = ModelFolder.resolve(SDXL)
    if not small:
        yield from _building(sdxl)
        yield from _training(sdxl)
    yield _loss_of_many_teachers(sdxl)
    with scratch_folder() as folder:
        yield _reader(folder, 100 if small else 100_000)
    with scratch_folder() as folder, one_thread():
        yield _builder(folder, 512 if small else 100_000)


def _building(sdxl: ModelFolder) -> Iterator[Row]:
    memory = prediction_memory(sdxl, torch.bfloat16, BATCH, SQUARE, NUM_TOKENS)
    yield _row(
        "SDXL, building predictions: peak", memory.peak_bytes / 1e9, "GB", BUILD_GB,
        f"weights {memory.weights_bytes / 1e9:.2f}, batch {memory.activations_bytes / 1e9:.2f}",
    )  # fmt: skip


def _training(sdxl: ModelFolder) -> Iterator[Row]:
    memory = training_memory(_distill(num_teachers=3), sdxl, SQUARE, NUM_TOKENS)
    parts = ("weights", "gradients", "activations", "optimizer")
    against = ", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in parts)
    yield _row("SDXL, training: peak", memory.peak / 1e9, "GB", TRAIN_GB, against)
    yield _row("SDXL, training: average in main memory", memory.ema / 1e9, "GB", None, "float32")


def _loss_of_many_teachers(sdxl: ModelFolder) -> Row:
    """What each teacher adds to a step beside its predictions, as a share of a float32 copy."""
    geometry = unet_geometry(sdxl)

    def loss_bytes(num_teachers: int) -> int:
        config = _distill(num_teachers)
        with counted_memory() as count:
            batch = batch_of_zeros(config, geometry, SQUARE, NUM_TOKENS, BATCH)
            weight = torch.nn.Parameter(torch.zeros(1))
            step = step_of(config, _Identity(weight), sdxl.noise_schedule(), torch.device("cpu"))
            before = count.live_bytes
            count.restart_peak()
            step.backward(batch, BATCH)
            return count.peak_bytes - before

    asked = UnetInput.zeros(geometry, BATCH, SQUARE, NUM_TOKENS)
    copies = 7 * asked.latents.numel() * torch.float32.itemsize
    share = (loss_bytes(8) - loss_bytes(1)) / copies
    return _row(
        "memory of the loss per teacher beside its predictions", share, "× float32 copy", 0.05,
        "the predictions of 8 teachers copied to float32 (the UNet runs once for all)",
    )  # fmt: skip


class _Identity(torch.nn.Module):
    """Stands for the student, whose own memory does not matter here."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, noisy_latents: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        return (noisy_latents * self.weight,)


def _reader(folder: Path, num_steps: int) -> Row:
    sets = write_sets(
        folder, num_records=64, num_teachers=3, layout="compact", side_px=64, records_per_shard=16
    )
    teachers = [open_shard_set(path) for path in sets.teachers]
    with JoinedStream(teachers, global_batch=1, num_threads=1) as stream:
        growth = _growth(lambda steps: _run_through(islice(stream.forever(), steps)), num_steps)
    for teacher in teachers:
        teacher.close()
    return _row(
        f"growth of main memory over {num_steps:,} steps of the reader", growth, "MiB", GROWTH_MIB,
        "resident size after a tenth of them",
    )  # fmt: skip


def _builder(folder: Path, num_records: int) -> Row:
    job = TinyJob(folder, side_px=64, records_per_shard=64)
    job.prepare(num_images=0)
    sizes: list[float] = []
    ManyRecords(job, num_records).build(lambda: sizes.append(_resident_mib()))
    after_warm_up = sizes[len(sizes) // WARM_UP :]
    return _row(
        f"growth of main memory over a build of {num_records:,} records",
        max(after_warm_up) - after_warm_up[0], "MiB", GROWTH_MIB,
        "resident size after a tenth of them; a UNet that costs nothing",
    )  # fmt: skip


def _growth(run: Callable[[int], object], num_steps: int) -> float:
    """Return how many MiB the process grew by in the steps after the first tenth."""
    run(num_steps // WARM_UP)
    before = _resident_mib()
    run(num_steps)
    return max(0.0, _resident_mib() - before)


def _run_through(values: Iterator[object]) -> None:
    for _ in values:
        pass


def _resident_mib() -> float:
    num_pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _distill(num_teachers: int) -> DistillConfig:
    return DistillConfig.model_validate(
        {
            "device": "cuda",
            "run": {"name": "memory"},
            "student": {"checkpoint_path": SDXL, "ema_device": "cpu"},
            "teachers": [{"teacher_id": f"teacher_{number}"} for number in range(num_teachers)],
            "training": {"batch_size": BATCH},
        }
    )


def _row(metric: str, value: float, unit: str, target: float | None, against: str) -> Row:
    return Row.of(metric, Sample((value,)), unit, better="lower", target=target, against=against)


if __name__ == "__main__":
    run_alone(measure)
