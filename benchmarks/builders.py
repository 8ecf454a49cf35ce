"""Builders: predictions and latents per second against bare loops over tensors in memory.

On the tiny family and one compute thread, which stands for a device beside the processor. Two
processes on two cores have no core left to hide their work on: what is lost is all they do, and
the two cores may be halves of one: then reading and writing slow the UNet down from beside it.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from measuring.rounds import Sample, alternate, seconds, stopwatch, timed_calls
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sdxl import NUM_TOKENS
from measuring.tiny_job import TinyJob

from sdxl_distill.catalog.image import fit_to_bucket, read_image, read_image_file
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.demo.family import one_thread
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import UnetInput, load_unet, predict, unet_geometry
from sdxl_distill.models.vae import encode_images, load_vae
from sdxl_distill.sets.latents_content import LatentsContent
from sdxl_distill.sets.predictions_content import PredictionsContent

BATCH: Final = 8
VAE_BATCH: Final = 4
RECORDS_PER_SHARD: Final = 64
"""A quarter of the images, so that two processes have equal shares of them."""
TARGET: Final = 0.95


def measure(small: bool) -> Iterator[Row | Curve]:
    """Build predictions in one process and in two, and latents, beside bare loops."""
    num_images, num_rounds = (32, 1) if small else (256, 3)
    with scratch_folder() as folder, one_thread():
        job = TinyJob(folder, side_px=64 if small else 256, records_per_shard=RECORDS_PER_SHARD)
        job.prepare(num_images)
        job.build_latents()
        job.build_text()
        yield from _predictions(job, num_images, num_rounds)
        yield from _two_processes(job, num_images, num_rounds)
        yield from _latents(job, num_images, num_rounds)


def _predictions(job: TinyJob, num_images: int, num_rounds: int) -> Iterator[Row]:
    layouts = ("compact", "full")
    build_seconds: dict[str, float] = {}
    model_shares: dict[str, list[float]] = {layout: [] for layout in layouts}
    contenders: dict[str, Callable[[], float]] = {"bare": seconds(_BareUnet(job, num_images))}
    for layout in layouts:

        def build(layout: str = layout) -> float:
            shutil.rmtree(job.root / "sets/predictions/teacher_a", ignore_errors=True)
            with stopwatch() as elapsed, timed_calls(PredictionsContent, "compute") as computing:
                built = job.build_predictions(job.builder(layout=layout, batch_size=BATCH))
                build_seconds[layout] = elapsed()
            summary = built.predictions.summary
            assert summary.num_records == num_images
            model_shares[layout].append(computing() / summary.seconds)
            return summary.seconds

        contenders[layout] = build
    found = alternate(contenders, num_rounds)
    for layout in layouts:
        conditions = {"layout": layout, "processes": 1}
        yield Row.of(
            "predictions/s against a bare loop",
            found["bare"].over(found[layout]),
            "×",
            conditions=conditions,
            target=TARGET,
            against=f"bare UNet loop, batches of {BATCH} in memory",
        )
        yield Row.of(
            "predictions/s",
            found[layout].rate_of(num_images),
            "predictions/s",
            conditions=conditions,
        )
        yield Row.of(
            "share in which the UNet computes",
            Sample(tuple(model_shares[layout])),
            "of 1",
            conditions=conditions,
            target=TARGET,
            against="the seconds of the build: reading and writing are hidden behind the UNet",
        )
    begin = build_seconds["compact"] - found["compact"].values[-1]
    yield Row.of(
        "build of predictions: identity of the teacher, loading it, manifest",
        Sample((begin,)),
        "s",
        conditions={"layout": "compact", "processes": 1},
        better="lower",
        against="once per build, last round",
    )


def _two_processes(job: TinyJob, num_images: int, num_rounds: int) -> Iterator[Row]:
    def clear() -> None:
        shutil.rmtree(job.root / "sets/predictions/teacher_a", ignore_errors=True)

    found = alternate(
        {
            "bare": lambda: max(_run_two(_bare_process, job, num_images // 2)),
            # The set is complete when the first of them says so; the other looks once a second.
            "builders": lambda: min(_run_two(_builder_process, job, num_images // 2, clear)),
        },
        num_rounds,
    )
    yield Row.of(
        "predictions/s against a bare loop",
        found["bare"].over(found["builders"]),
        "×",
        conditions={"layout": "compact", "processes": 2},
        target=TARGET,
        against="2 bare UNet loops at once",
    )


def _run_two(
    worker: Callable[..., None],
    job: TinyJob,
    num_records: int,
    before: Callable[[], object] = lambda: None,
) -> list[float]:
    """Return the seconds of each of two processes that begin together."""
    before()
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=worker, args=(job, num_records, barrier, answers)) for _ in range(2)
    ]
    for each in workers:
        each.start()
    found = [answers.get(timeout=600) for _ in workers]
    for each in workers:
        each.join()
    return found


def _bare_process(job: TinyJob, num_records: int, barrier: Barrier, answers: Any) -> None:
    torch.set_num_threads(1)
    run = seconds(_BareUnet(job, num_records))
    barrier.wait()
    answers.put(run())


def _builder_process(job: TinyJob, num_records: int, barrier: Barrier, answers: Any) -> None:
    del num_records  # the two share what there is
    torch.set_num_threads(1)
    config = job.builder(batch_size=BATCH)
    barrier.wait()
    answers.put(job.build_predictions(config).predictions.summary.seconds)


class _BareUnet:
    """Runs the teacher over as many records, the same inputs again and again."""

    def __init__(self, job: TinyJob, num_records: int) -> None:
        checkpoint = ModelFolder.resolve(str(job.family / "teacher_a"))
        self._unet = load_unet(checkpoint, torch.float32, "cpu")
        size = (job.side_px, job.side_px)
        asked = UnetInput.zeros(unet_geometry(checkpoint), BATCH, size, NUM_TOKENS)
        latents = torch.randn(asked.latents.shape, generator=torch.Generator().manual_seed(0))
        self._inputs = (latents, *asked[1:])
        self._num_batches = num_records // BATCH
        self._predict()

    def __call__(self) -> None:
        for _ in range(self._num_batches):
            self._predict()

    @torch.no_grad()
    def _predict(self) -> None:
        predict(self._unet, *self._inputs)


def _latents(job: TinyJob, num_images: int, num_rounds: int) -> Iterator[Row]:
    whole_seconds: list[float] = []
    model_shares: list[float] = []

    def build() -> float:
        shutil.rmtree(job.root / "fresh", ignore_errors=True)
        with stopwatch() as elapsed, timed_calls(LatentsContent, "compute") as computing:
            built = job.build_latents("fresh").built
            whole_seconds.append(elapsed())
        assert built.summary.num_records == num_images
        model_shares.append(computing() / built.summary.seconds)
        return built.summary.seconds

    found = alternate({"bare": seconds(_BareVae(job)), "build": build}, num_rounds)
    yield Row.of(
        "latents/s against a bare loop, decode and resize overlapped",
        found["bare"].over(found["build"]),
        "×",
        conditions={"processes": 1},
        target=TARGET,
        against=f"bare VAE loop, batches of {VAE_BATCH} decoded images in memory",
    )
    yield Row.of(
        "share in which the VAE computes",
        Sample(tuple(model_shares)),
        "of 1",
        conditions={"processes": 1},
        target=TARGET,
        against="the seconds of the build: decoding, reading and writing are hidden behind the VAE",
    )
    rate = found["build"].rate_of(num_images)
    yield Row.of("latents/s", rate, "latents/s", conditions={"processes": 1})
    yield Row.of(
        "build of latents: scan, identity of the VAE, loading it, manifest",
        Sample((whole_seconds[-1] - found["build"].values[-1],)),
        "s",
        conditions={"processes": 1},
        better="lower",
        against="once per build, last round",
    )


class _BareVae:
    """Encodes all images, decoded and cropped before."""

    def __init__(self, job: TinyJob) -> None:
        checkpoint = ModelFolder.resolve(str(job.family / "base"))
        self._vae = load_vae(checkpoint, torch.float32, "cpu")
        paths = sorted((job.root / "images").glob("*.jpg"))
        self._batches = [
            _pixels(paths[start : start + VAE_BATCH], Bucket(job.side_px, job.side_px))
            for start in range(0, len(paths), VAE_BATCH)
        ]
        encode_images(self._vae, self._batches[0])

    def __call__(self) -> None:
        for pixels in self._batches:
            encode_images(self._vae, pixels)


def _pixels(paths: list[Path], bucket: Bucket) -> torch.Tensor:
    decoded = [read_image(read_image_file(path, path.name), path.name, 1 << 24) for path in paths]
    return torch.from_numpy(np.stack([fit_to_bucket(each.pixels, bucket) for each in decoded]))


if __name__ == "__main__":
    run_alone(measure)
