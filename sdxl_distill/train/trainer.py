"""The training loop: stream → gradients → optimizer → average → log → checkpoint.

In: a configuration, the joined stream and the student. Out: the run folder. Position, weights,
optimizer state and average are the whole state of a run; nothing else is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import exp
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdxl_distill.config.distill import DistillConfig, StudentSection, TrainingSection
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import NumericalError, Preempted
from sdxl_distill.optimizer.adamw import AdamW, clip_factor, global_grad_norm
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.runtime.world import World
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.agreement import Agreement, Verdict, shared_numbers
from sdxl_distill.train.average_exchange import lent_averages
from sdxl_distill.train.ema import BackgroundAverage, Ema, FollowedWeight
from sdxl_distill.train.learning_rate import learning_rate_at
from sdxl_distill.train.report import RunReport, loss_tags
from sdxl_distill.train.run_folder import RunFolder, decisive_fields
from sdxl_distill.train.run_lock import RunLock
from sdxl_distill.train.run_state import Position
from sdxl_distill.train.saved_run import SavedRun, TrainingState
from sdxl_distill.train.step import DistillationStep
from sdxl_distill.train.validation import Validation


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended: the step it reached and the last value of every loss tag."""

    global_step: int
    losses: dict[str, float]
    seconds: float


class Trainer:
    """Trains one student.

    Args:
        config: the run's configuration.
        student: the UNet, on the accelerator's device, in the dtype it is trained in.
        noise_schedule: the student's noise schedule.
        student_fingerprint: fingerprint of the weights it starts from.
        stream: the joined shard sets, for this rank.
        accelerator: the ranks; without mixed precision, which would change the outputs' dtype.
        lock: the run folder's lock, on the main rank; None where no other process writes there.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module,
        noise_schedule: NoiseSchedule,
        student_fingerprint: str,
        stream: JoinedStream,
        accelerator: Accelerator,
        lock: RunLock | None = None,
    ) -> None:
        self.config = config
        self.stream = stream
        self.accelerator = accelerator
        self.folder = RunFolder.of(config)
        # Walking through the modules takes a millisecond, and every step would do it twice.
        self._weights = tuple(student.named_parameters())
        self.identity: dict[str, Any] = {
            "config": decisive_fields(config),
            "student": student_fingerprint,
            "noise_schedule": noise_schedule.to_json(),
            "sets": stream.fingerprints(),
        }
        optimizer = make_optimizer(config.training, self._weights, accelerator.device.type)
        ema = make_ema(
            config.student, student, accelerator.process_index, accelerator.num_processes
        )
        num_threads = World.from_environment().num_cores
        self._average = ema and BackgroundAverage(ema, accelerator.device, num_threads)
        self._followed = followed_weights(self._weights, optimizer)
        self.state = TrainingState(student, optimizer, ema)
        self.saved_run = SavedRun(
            self.folder.checkpoints(config.training.keep_checkpoints),
            self.identity,
            stream.order.identity(),
            config.data.on_change,
            accelerator,
            lock,
        )
        self.step = DistillationStep(
            accelerator.prepare_model(student),
            noise_schedule,
            stream.prediction_types,
            config.normalised_weights(),
            config.training.loss_type,
            config.training.huber_delta,
            accelerator.device,
        )
        self._validation = Validation(
            self.step,
            stream,
            config.training.batch_size,
            config.training.validation.max_records,
            accelerator,
        )

    @property
    def position(self) -> Position:
        """The steps that are done."""
        return self.state.position

    def resume(self, reference: str) -> None:
        """Load a checkpoint: `latest`, or the path of one. Raises as `SavedRun.resume`."""
        self.saved_run.resume(reference, self.state)

    def run(self, stop: StopRequest) -> TrainSummary:
        """Train from the present position to `training.num_steps`.

        Args:
            stop: this rank's stop request; a single one stops all ranks at the same step.

        Raises:
            NumericalError: when loss or gradients are not finite, or not the same on all ranks;
                that step is not saved.
            Preempted: when asked to stop before the last step; the state is saved.
        """
        settings = self.config.training
        started_seconds = time.perf_counter()
        with self._open_report() as report, self.saved_run.committed():
            agreement = Agreement(self.accelerator)
            batches = self._settled(self.stream.forever(self.position.epoch, self.position.step))
            while self.position.global_step < settings.num_steps:
                # Wait for the stream; a checkpoint that could not be written ends the run.
                self.saved_run.check()
                waiting_seconds = time.perf_counter()
                batch = next(batches)
                waited_seconds = time.perf_counter() - waiting_seconds

                # Gradients of the mean loss over the global batch.
                loss_sums = self.step.backward(batch, settings.batch_size)
                grad_norm = global_grad_norm(weight for _, weight in self._weights)
                agreement.ask(stop.requested, loss_sums, self._shared(grad_norm))

                # Clip, step, average.
                learning_rate = self._update(grad_norm)
                self.state.position = self._after(batch)

                # Agree with the other ranks before anything of this step is kept.
                verdict = agreement.answer()
                if not verdict.is_finite:
                    self.saved_run.finish()
                    raise self._not_finite(batch, loss_sums)
                if not verdict.is_shared:
                    raise self._drifted(verdict)
                report.count(loss_sums, len(batch), waited_seconds)

                # Log, validate, save.
                is_last = self.position.global_step == settings.num_steps
                if is_last or self._is_due(settings.log_every):
                    report.log(self.position.global_step, batch.epoch, learning_rate, grad_norm)
                stops = verdict.stop
                if (is_last or self._is_due(settings.validation.every)) and not stops:
                    stops = not self._validate(report, stop)
                if is_last or stops or self._is_due(settings.checkpoint_every):
                    stops |= self.save(stop)
                    report.note_stall(self.position.global_step, self.saved_run.stall_seconds)
                if stops and not is_last:
                    self.saved_run.finish()
                    raise self._preempted()
        seconds = time.perf_counter() - started_seconds
        return TrainSummary(self.position.global_step, report.latest, seconds)

    def save(self, stop: StopRequest) -> bool:
        """Save a checkpoint of the present position; it is written while the run goes on.

        Returns:
            Whether any rank was asked to stop before this was done.
        """
        self._finish_average()
        return self.saved_run.save(self.state, stop)

    def _open_report(self) -> RunReport:
        return RunReport(
            self.config.run.name,
            self.folder.tensorboard(self.config.training.tensorboard.base_dir),
            loss_tags(self.stream.teacher_ids),
            self.accelerator,
            num_steps=self.config.training.num_steps,
            num_done=self.position.global_step,
        )

    def _validate(self, report: RunReport, stop: StopRequest) -> bool:
        """Log the losses on held-out images; False when it was asked to stop before the end."""
        self._finish_average()
        validation = self._validation
        if not validation.run("validation", report, self.position.global_step, stop):
            return False
        if self.state.ema is None:
            return True
        with lent_averages(self.state.student, self.state.ema, self.accelerator):
            return validation.run("validation_ema", report, self.position.global_step, stop)

    def _settled(self, batches: Iterator[JoinedBatch]) -> Iterator[JoinedBatch]:
        """Let data parallelism arrange its gradient buckets before the first step that counts.

        It rearranges them once, after the first backward pass, which changes the order of its
        sums: without this a resumed run of three or more ranks would differ in its first step.
        """
        if not isinstance(self.step.student, DistributedDataParallel):
            return batches
        first = next(batches)
        warm_up = next(first.micro_batches(1)).to(self.accelerator.device)
        self.step.losses(warm_up).loss.sum().backward()
        self.state.optimizer.zero_grad(set_to_none=True)
        return chain([first], batches)

    def _update(self, grad_norm: torch.Tensor) -> float:
        settings = self.config.training
        learning_rate = learning_rate_at(
            self.position.global_step,
            lr=settings.lr,
            num_steps=settings.num_steps,
            warmup_steps=settings.num_warmup_steps,
            schedule=settings.lr_schedule,
            min_lr_ratio=settings.min_lr_ratio,
        )
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        max_norm = settings.max_grad_norm
        self._finish_average()
        self.state.optimizer.step(1.0 if max_norm is None else clip_factor(grad_norm, max_norm))
        self.state.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.start(self._followed, self.position.global_step)
        return learning_rate

    def _finish_average(self) -> None:
        if self._average is not None:
            self._average.finish()

    def _after(self, batch: JoinedBatch) -> Position:
        done = self.position.global_step + 1
        if batch.step + 1 < self.stream.order.steps(batch.epoch):
            return Position(done, batch.epoch, batch.step + 1)
        return Position(done, batch.epoch + 1, 0)

    def _is_due(self, every: int) -> bool:
        return self.position.global_step % every == 0

    def _not_finite(self, batch: JoinedBatch, loss_sums: torch.Tensor) -> NumericalError:
        what = "gradient" if bool(loss_sums.isfinite().all()) else "loss"
        steps = self.saved_run.checkpoints.steps()
        return NumericalError(
            f"the {what} is NaN or infinite (rank {self.accelerator.process_index}: records "
            f"{', '.join(batch.keys)})",
            where=f"step {self.position.global_step}, epoch {batch.epoch}, bucket {batch.bucket}",
            action=(
                f"the checkpoint of step {steps[-1]} is intact: export it, and train from there "
                "in a new run with a smaller training.lr"
                if steps
                else "start again with a smaller training.lr"
            )
            + "; verify the shards of these records",
        )

    def _shared(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Return what shows that all ranks train the same student; another weight at each step."""
        _, weight = self._weights[self.position.global_step % len(self._weights)]
        return shared_numbers(grad_norm, weight)

    def _drifted(self, verdict: Verdict) -> NumericalError:
        (norm_low, weight_low), (norm_high, weight_high) = verdict.lowest, verdict.highest
        return NumericalError(
            "the ranks train different students: the gradients' norm is "
            f"{exp(norm_low):.9g} to {exp(norm_high):.9g}, a weight's sum in units of its norm is "
            f"{weight_low:.9g} to {weight_high:.9g}",
            expected="the same on all ranks",
            where=f"step {self.position.global_step}",
            action="look for a faulty device or link, then go on with `--resume latest`",
        )

    def _preempted(self) -> Preempted:
        return Preempted(
            f"asked to stop after step {self.position.global_step}; its checkpoint is saved",
            where=str(self.folder.path),
            action="run the same command with `--resume latest`",
        )


def make_optimizer(
    settings: TrainingSection, weights: Iterable[tuple[str, torch.Tensor]], device_type: str
) -> AdamW:
    """Return the optimizer of named weights that a configuration asks for on "cuda" or "cpu".

    Exact masters that are `auto` still are not kept.
    """
    use_8bit = settings.optimizer == "adamw_8bit" or (
        settings.optimizer == "auto" and device_type == "cuda"
    )
    return AdamW(
        weights,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        states="8bit" if use_8bit else "fp32",
        exact_masters=settings.exact_masters is True,
        seed=settings.seed,
        compiled=settings.compile_optimizer and device_type == "cuda",
    )


def make_ema(
    settings: StudentSection, student: nn.Module, rank: int = 0, num_ranks: int = 1
) -> Ema | None:
    """Return a rank's share of the average that starts at the student; None when it is off."""
    if not settings.use_ema:
        return None
    return Ema(
        student.named_parameters(),
        settings.ema_decay,
        torch.device("cpu") if settings.ema_device == "cpu" else None,
        ema_every=settings.ema_every,
        rank=rank,
        num_ranks=num_ranks,
    )


def followed_weights(
    weights: Iterable[tuple[str, torch.Tensor]], optimizer: AdamW
) -> tuple[FollowedWeight, ...]:
    """Return named weights as an average follows them: with what bfloat16 lacks of their masters.

    Weights with exact masters may not change for many steps while their masters do.
    """
    return tuple(
        FollowedWeight(name, weight, optimizer.remainder(weight)) for name, weight in weights
    )
