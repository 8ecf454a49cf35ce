"""The trainer's step against a bare loop: forward, backward, clipping and torch's own AdamW.

On the tiny family, in float32, one compute thread, three teachers, the loader in its threads. The
same student, batch size and sizes; the bare loop has its one batch in memory.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Final
from unittest import mock

import torch
import torch.nn.functional as F
from measuring.rounds import Sample, alternate, seconds
from measuring.row import Curve, Row
from measuring.scratch import scratch_folder
from measuring.script import run_alone
from measuring.sdxl import NUM_TOKENS
from measuring.tiny_job import TinyJob, quiet

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.demo.family import one_thread
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import UnetInput, predict, unet_geometry
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.train.ema import Ema
from sdxl_distill.train.report import RunReport
from sdxl_distill.train.session import load_student, make_accelerator, open_stream, open_teachers
from sdxl_distill.train.trainer import Trainer

NUM_TEACHERS: Final = 3
BATCHES: Final = (4, 8)
IMAGES_PER_RUN: Final = 96
STEP_TARGET: Final = 1.05
SHARE_TARGET: Final = 0.01
CPU: Final = torch.device("cpu")


def measure(small: bool) -> Iterator[Row | Curve]:
    """Time steps with and without the average; wait, logging, checkpoints and average apart."""
    num_images, num_rounds = (16, 1) if small else (96, 4)
    with scratch_folder() as folder, one_thread():
        job = TinyJob(folder, side_px=64 if small else 256)
        job.prepare(num_images, NUM_TEACHERS)
        job.build_latents()
        for teacher_id in ("teacher_a", "teacher_b", "teacher_c"):
            job.build_predictions(job.builder(teacher_id))
        for batch_size in (2,) if small else BATCHES:
            num_steps = 3 if small else IMAGES_PER_RUN // batch_size
            yield from _steps(job, batch_size, num_steps, num_rounds)


def _steps(job: TinyJob, batch_size: int, num_steps: int, num_rounds: int) -> Iterator[Row]:
    plain, averaging = (
        _Runs(job, batch_size, num_steps, use_ema=use_ema) for use_ema in (False, True)
    )
    bare = seconds(_BareLoop(job, batch_size, num_steps))
    found = alternate({"bare": bare, "plain": plain, "averaging": averaging}, num_rounds)
    without, conditions = ({"batch": batch_size, "average": each} for each in ("without", "with"))
    yield Row.of(
        "step of the trainer against a bare loop",
        found["plain"].over(found["bare"]),
        "×",
        conditions=without,
        better="lower",
        target=STEP_TARGET,
        against="bare forward + backward + clipping + AdamW on one batch in memory",
    )
    yield Row.of(
        "step of the trainer against a bare loop",
        found["averaging"].over(found["bare"]),
        "×",
        conditions=conditions,
        better="lower",
        against="the same bare loop, which keeps no average",
    )
    step_seconds = averaging.share("step", num_steps)
    yield Row.of("step", step_seconds, "s", better="lower", conditions=conditions)
    for name, meaning, target in (
        ("wait", "waiting for data", SHARE_TARGET),
        ("log", "logging", SHARE_TARGET),
        ("average", "the average", None),
    ):
        yield Row.of(
            f"share of the step: {meaning}",
            averaging.share(name),
            "of 1",
            conditions=conditions,
            better="lower",
            target=target,
            against="all steps of a run",
        )
    yield Row.of(
        "checkpoint stall",
        Sample(tuple(averaging.spent["save"])),
        "s",
        conditions=conditions,
        better="lower",
        against="weights, states and average of the tiny student, flushed to the disk",
    )


class _Runs:
    """A contender that trains anew each time it is called.

    Attributes:
        spent: what → its seconds, one for each run.
    """

    def __init__(self, job: TinyJob, batch_size: int, num_steps: int, *, use_ema: bool) -> None:
        self._job = job
        config = job.distill(
            NUM_TEACHERS, batch_size=batch_size, num_steps=num_steps, validation={"fraction": 0.0}
        )
        student = config.student.model_copy(update={"use_ema": use_ema})
        self._config = config.model_copy(update={"student": student})
        self.spent: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> float:
        for name in ("runs", "logs"):
            shutil.rmtree(self._job.root / name, ignore_errors=True)
        clock = _Clock()
        with quiet(), _trainer(self._config) as trainer, ExitStack() as patches:
            for owner, name, label in (
                (RunReport, "log", "log"),
                (RunReport, "count", "log"),
                (trainer, "save", "save"),
                (Ema, "update", "average"),
            ):
                timed = clock.timed(getattr(owner, name), label)
                patches.enter_context(mock.patch.object(owner, name, timed))
            step_seconds = trainer.run(StopRequest()).seconds - clock.spent["save"]
        clock.spent["step"] = step_seconds
        for name in ("wait", "log", "save", "average", "step"):
            self.spent[name].append(clock.spent[name])
        return step_seconds

    def share(self, name: str, num_steps: int | None = None) -> Sample:
        """Return what part of the steps something took; with a number, seconds per step."""
        whole = self.spent["step"] if num_steps is None else [num_steps] * len(self.spent[name])
        pairs = zip(self.spent[name], whole, strict=True)
        return Sample(tuple(part / all_steps for part, all_steps in pairs))


class _Clock:
    """Adds up the seconds spent in functions, and what the trainer says it waited."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """Return the function with a stop-watch."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            self.spent[label] += time.perf_counter() - started
            if function.__name__ == "count":
                self.spent["wait"] += arguments[-1]
            return result

        return run


@contextmanager
def _trainer(config: DistillConfig) -> Iterator[Trainer]:
    accelerator = make_accelerator(config)
    with open_teachers(config) as teachers, open_stream(config, teachers, accelerator) as stream:
        checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
        yield Trainer(
            config,
            load_student(config.student, checkpoint, accelerator.device),
            checkpoint.noise_schedule(),
            checkpoint.unet_fingerprint(),
            stream,
            accelerator,
        )


class _BareLoop:
    """As little as training can be."""

    def __init__(self, job: TinyJob, batch_size: int, num_steps: int) -> None:
        config = job.distill(NUM_TEACHERS)
        checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
        self._student = load_student(config.student, checkpoint, CPU)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=1e-4)
        size = (job.side_px, job.side_px)
        asked = UnetInput.zeros(unet_geometry(checkpoint), batch_size, size, NUM_TOKENS)
        generator = torch.Generator().manual_seed(0)
        latents, self._target = (
            torch.randn(asked.latents.shape, generator=generator) for _ in range(2)
        )
        self._inputs = (latents, *asked[1:])
        self._num_steps = num_steps

    def __call__(self) -> None:
        for _ in range(self._num_steps):
            F.mse_loss(predict(self._student, *self._inputs), self._target).backward()
            torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()


if __name__ == "__main__":
    run_alone(measure)
