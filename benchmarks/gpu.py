"""The real SDXL on a real card: forwards, building with shard writing on, training, memory.

The UNet has its published sizes and random weights; nothing is downloaded. A machine without a
GPU prints "not measured".
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from measuring.rounds import Sample
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sdxl import NUM_TOKENS, SDXL, SQUARE
from measuring.sets import write_sets
from measuring.tiny_job import quiet

from sdxl_distill.builder.set_builder import build_set
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.estimate.training import batch_of_zeros, step_of
from sdxl_distill.models.component import channels_last_on_gpu
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import UnetInput, compile_unet, predict, unet_geometry
from sdxl_distill.optimizer.adamw import clip_factor, global_grad_norm
from sdxl_distill.runtime.device import allow_tf32
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.derived_shards import planned_after
from sdxl_distill.sets.predictions_content import PredictionsContent, Teacher
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.storage.location import Location
from sdxl_distill.train.trainer import make_optimizer

BUILD_BATCH: Final = 8
TRAIN_BATCH: Final = 4
FORWARD_TFLOP: Final = 6.76
FORWARDS_PER_STEP: Final = 4
"""With gradient checkpointing: two forwards, and a backward of the work of two."""
PEAK_TFLOPS: Final = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}
"""bfloat16 without sparsity, from the vendor's data sheets; H100 is the SXM card."""
AIM: Final = {"H200": 40.0, "H100": 40.0, "A100": 20.0}
METRICS: Final = {
    "SDXL forwards/s": "forwards/s",
    "MFU of the forwards": "of 1",
    "predictions/s built, shard writing on": "predictions/s",
    "records/s trained": "records/s",
    "peak memory, training": "GB",
}


def measure(small: bool) -> Iterator[Row | Curve]:
    """Measure on the first CUDA device; without one say so."""
    if not torch.cuda.is_available():
        for metric, unit in METRICS.items():
            yield Row.missing(metric, unit, "not measured: no CUDA device")
        return
    device = torch.device("cuda", 0)
    allow_tf32(True)
    checkpoint = ModelFolder.resolve(SDXL)
    seconds = 1.0 if small else 20.0
    for compiled in (False,) if small else (False, True):
        yield from _building(checkpoint, device, seconds, compiled=compiled)
    yield from _training(checkpoint, device, seconds)


def _random_unet(checkpoint: ModelFolder, device: torch.device) -> torch.nn.Module:
    """Return a UNet with small random weights in bfloat16, laid out as a loaded one."""
    unet = checkpoint.unet.on_meta().to_empty(device=device).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.normal_(0, 0.02, generator=generator)
    return channels_last_on_gpu(unet).requires_grad_(False).eval()


def _building(
    checkpoint: ModelFolder, device: torch.device, seconds: float, *, compiled: bool
) -> Iterator[Row]:
    unet = _random_unet(checkpoint, device)
    if compiled:
        compile_unet(unet, "full", 1)
    asked = UnetInput.zeros(unet_geometry(checkpoint), BUILD_BATCH, SQUARE, NUM_TOKENS)
    latents, *others = (tensor.to(device) for tensor in asked)

    @torch.no_grad()
    def forward() -> None:
        predict(unet, latents, *others)

    torch.cuda.reset_peak_memory_stats(device)
    forwards = _rate(forward, seconds, device) * BUILD_BATCH
    teacher = Teacher(unet, checkpoint.noise_schedule(), device, torch.float16, BUILD_BATCH)
    num_records = max(4 * BUILD_BATCH, int(forwards * seconds) // BUILD_BATCH * BUILD_BATCH)
    with scratch_folder() as folder:
        built = _built_per_second(folder, teacher, num_records)
    memory_gb = torch.cuda.max_memory_allocated(device) / 1e9
    card, against = torch.cuda.get_device_name(device), "compiled" if compiled else "eager"
    against = f"{card}, 1024², batches of {BUILD_BATCH}, bfloat16, {against}"
    yield _row("SDXL forwards/s", forwards, "forwards/s", against, _of_card(AIM, card))
    peak = _of_card(PEAK_TFLOPS, card)
    if peak is not None:
        utilisation = forwards * FORWARD_TFLOP / peak
        yield _row("MFU of the forwards", utilisation, "of 1", f"{peak} TFLOP/s")
    yield _row(
        "predictions/s built, shard writing on", built, "predictions/s", against,
        _of_card(AIM, card),
    )  # fmt: skip
    yield _row("of the bare forwards", built / forwards, "×", "the loop without files")
    yield _row("peak memory, building", memory_gb, "GB", against)


def _built_per_second(folder: Path, teacher: Teacher, num_records: int) -> float:
    """Build the predictions of random latents and text with the product's own loop."""
    sets = write_sets(
        folder / "sets",
        num_records=num_records,
        num_teachers=1,
        layout="compact",
        records_per_shard=64,
    )
    assert sets.text is not None
    path = sets.teachers[0]
    with open_shard_set(path) as present:
        identity = present.manifest.identity
    shutil.rmtree(path)
    assert identity.noise is not None
    with quiet(), open_shard_set(sets.latents) as latents, open_shard_set(sets.text) as text:
        content = PredictionsContent(teacher, latents, text, identity.noise, BUILD_BATCH)
        built = build_set(
            Location(path),
            identity,
            planned_after(latents, identity.id),
            lambda: content,
            lambda _, found, indices: Manifest.build(found, 0, indices),
            World(),
        )
    return built.summary.records_per_second


def _training(checkpoint: ModelFolder, device: torch.device, seconds: float) -> Iterator[Row]:
    config = DistillConfig.model_validate(
        {
            "run": {"name": "gpu"},
            "student": {"checkpoint_path": SDXL, "ema_device": "cpu"},
            "teachers": [{"teacher_id": name} for name in ("a", "b", "c")],
            "training": {"batch_size": TRAIN_BATCH},
        }
    )
    student = _random_unet(checkpoint, device).requires_grad_(True).train()
    student.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(config.training, student.named_parameters(), device.type)
    step = step_of(config, student, checkpoint.noise_schedule(), device)
    batch = batch_of_zeros(config, unet_geometry(checkpoint), SQUARE, NUM_TOKENS, TRAIN_BATCH)
    weights = list(student.parameters())

    def train() -> None:
        step.backward(batch, TRAIN_BATCH)
        optimizer.step(clip_factor(global_grad_norm(weights), 1.0))
        optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats(device)
    records = _rate(train, seconds, device) * TRAIN_BATCH
    card = torch.cuda.get_device_name(device)
    against = f"{card}, 1024², batch {TRAIN_BATCH}, bfloat16, checkpointing, 8-bit states"
    yield _row("records/s trained", records, "records/s", against)
    peak = _of_card(PEAK_TFLOPS, card)
    if peak is not None:
        utilisation = records * FORWARDS_PER_STEP * FORWARD_TFLOP / peak
        yield _row("hardware utilisation of training", utilisation, "of 1", f"{peak} TFLOP/s")
    memory_gb = torch.cuda.max_memory_allocated(device) / 1e9
    yield Row.of(
        "peak memory, training", Sample((memory_gb,)), "GB",
        better="lower", target=20.0, against=against,
    )  # fmt: skip


def _rate(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return runs per second, after three that do not count."""
    for _ in range(3):
        run()
    torch.cuda.synchronize(device)
    started, num_runs = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run()
        num_runs += 1
        if num_runs % 4 == 0:
            torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)
    return num_runs / (time.perf_counter() - started)


def _of_card(numbers: Mapping[str, float], card: str) -> float | None:
    return next((number for name, number in numbers.items() if name in card), None)


def _row(metric: str, value: float, unit: str, against: str, target: float | None = None) -> Row:
    return Row.of(metric, Sample((value,)), unit, target=target, against=against)


if __name__ == "__main__":
    run_alone(measure)
