"""From a configuration to a trained student: everything a run needs, cheapest checks first.

What does not fit is refused before any weights are read: the sets with each other, then student
and sets, then the checkpoint that is resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)

from sdxl_distill.config.distill import DistillConfig, StudentSection
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.core.prediction import MIN_SIGNAL
from sdxl_distill.errors import ConfigError, DistillError, IncompatibleError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import require_fit, text_geometry
from sdxl_distill.models.unet import compile_unet, load_unet, unet_geometry
from sdxl_distill.runtime.device import allow_tf32, resolve_device
from sdxl_distill.runtime.world import World
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.joined_sets import noise_schedule_of, recipe_of
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.agreement import sum_over_ranks, told_by_main
from sdxl_distill.train.memory_choice import settle_memory
from sdxl_distill.train.run_folder import RunFolder, require_same_configuration
from sdxl_distill.train.run_lock import RunLock
from sdxl_distill.train.run_state import RunState
from sdxl_distill.train.stop_signals import StopSignals, end_with_launcher
from sdxl_distill.train.trainer import Trainer, TrainSummary

# The ranks wait for one of them to write a checkpoint, which may be large and its disk slow.
_COLLECTIVE_TIMEOUT: Final = timedelta(hours=2)
_MAX_VIEWS_OF_A_DRAW: Final = 8
_MAX_USUAL_READERS: Final = 4

_log = logging.getLogger(__name__)


def train_student(
    config: DistillConfig, resume: str | None = None, signals: StopSignals | None = None
) -> TrainSummary:
    """Train the student of a configuration, or resume its training.

    Args:
        config: the run's configuration.
        resume: `latest`, the path of a checkpoint, or None for a new run. `latest` of a run
            without a checkpoint starts it, so that a requeued job needs no other command.
        signals: the signals that stop it, listened to already; None: nothing stops it.

    Raises:
        ConfigError: for a run that exists already, a missing set or checkpoint, or a number of
            processes that does not divide the lanes.
        IncompatibleError: when sets, student and checkpoint do not belong together.
        CorruptError, StorageError: when something cannot be read or written.
        NumericalError: when loss or gradients are not finite, or not the same on all ranks.
        Preempted: when a signal asked to stop; the state is saved.
        KeyboardInterrupt: when a signal came before the first step, or a second one insisted.
    """
    # Refuse a run that exists, before anything else starts.
    signals = signals or StopSignals()
    end_with_launcher()
    folder = RunFolder.of(config)
    if resume is None:
        folder.require_new()
    accelerator = make_accelerator(config)
    with open_teachers(config) as teachers, open_stream(config, teachers, accelerator) as stream:
        # Sets and student must belong together.
        model_folder = ModelFolder.resolve(config.student.checkpoint_path)
        text = text_geometry(ModelFolder.resolve(config.text_source))
        require_fit(text, unet_geometry(model_folder), f"student {model_folder.reference}")
        noise_schedule = model_folder.noise_schedule()
        require_same_table(noise_schedule, stream)
        require_convertible(noise_schedule, teachers)

        # Nothing has been written so far; another process may be training this run.
        with locked_run(folder, accelerator) as lock:
            start = folder.start(resume, config.training.num_steps)
            if accelerator.is_main_process:
                folder.prepare()
                warn_of_memorising(stream, config.training.num_steps)

            saved = _saved_state(config, folder, start)

            # Load the weights, and go on where the checkpoint ends.
            trainer = _load_trainer(
                config, model_folder, noise_schedule, stream, accelerator, lock, saved
            )
            if start is not None:
                trainer.resume(start)
                _log.info("resumed at step %d", trainer.position.global_step)
            if accelerator.is_main_process:
                identity = {**trainer.identity, "stream": stream.order.identity()}
                folder.write(trainer.config, identity)
            with signals.deferred() as stop:
                return trainer.run(stop)


def _saved_state(config: DistillConfig, folder: RunFolder, start: str | None) -> RunState | None:
    """Return the state to go on from, if there is one and the configuration is that run's."""
    saved = None if start is None else folder.saved_state(start)
    if saved is not None:
        require_same_configuration(config, saved, str(folder.path))
    return saved


def _load_trainer(
    config: DistillConfig,
    model_folder: ModelFolder,
    noise_schedule: NoiseSchedule,
    stream: JoinedStream,
    accelerator: Accelerator,
    lock: RunLock | None,
    saved: RunState | None,
) -> Trainer:
    """Load the student's weights, and make all that trains them."""
    student = load_student(config.student, model_folder, accelerator.device)
    if config.training.compile != "none":
        # One extra for the warm-up pass of data parallelism.
        compile_unet(student, config.training.compile, len(stream.order.table.buckets) + 1)
    saved_masters = None if saved is None else bool(saved.optimizer.get("exact_masters"))
    config = settle_memory(config, student, model_folder, stream, accelerator, saved_masters)
    fingerprint = told_by_main(accelerator, model_folder.unet_fingerprint)
    return Trainer(config, student, noise_schedule, fingerprint, stream, accelerator, lock)


@contextmanager
def locked_run(folder: RunFolder, accelerator: Accelerator) -> Iterator[RunLock | None]:
    """Let the main rank hold the lock of a run within the block; the others have None.

    Raises:
        ConfigError: on every rank, when another launch trains this run.
        StorageError: when the disk refuses.
    """
    with ExitStack() as held:
        lock: RunLock | None = None
        refusal: DistillError | None = None
        if accelerator.is_main_process:
            try:
                lock = held.enter_context(RunLock(folder.path))
            except DistillError as error:
                refusal = error
        refused = torch.tensor(float(refusal is not None), device=accelerator.device)
        is_refused = bool(sum_over_ranks(accelerator, refused) > 0)
        if refusal is not None:
            raise refusal
        if is_refused:
            raise ConfigError(
                "the main process could not take the run's lock",
                where=str(folder.path),
                action="look at its message",
            )
        yield lock


def make_accelerator(config: DistillConfig) -> Accelerator:
    """Join the ranks of the launch.

    Mixed precision stays off whatever the launcher says: the weights' own dtype decides.

    Raises:
        ConfigError: when the configured device is not there, or not the launcher's.
    """
    world = World.from_environment()
    device = resolve_device(config.device, world.local_rank)
    allow_tf32(config.tf32)
    # DDP would keep a second copy of all gradients without the views.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    group = InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp, group]
    )
    if accelerator.num_processes != world.size:
        raise ConfigError(
            f"the launcher started {world.size} processes, but they do not know each other",
            where="launcher",
            action="on CPUs launch with ACCELERATE_USE_CPU=true and --multi_gpu "
            "--num_processes N, see launch/accelerate",
        )
    return accelerator


@contextmanager
def open_teachers(config: DistillConfig) -> Iterator[list[ShardSet]]:
    """Open the predictions sets of all teachers within the block.

    Raises:
        ConfigError: when one is not there or not complete.
        CorruptError, StorageError: when a manifest cannot be read.
    """
    with ExitStack() as opened:
        yield [
            opened.enter_context(_open_teacher(Path(each.cache_dir), each.teacher_id))
            for each in config.teachers
        ]


@contextmanager
def open_stream(
    config: DistillConfig, teachers: Sequence[ShardSet], accelerator: Accelerator
) -> Iterator[JoinedStream]:
    """Open the joined sets of all teachers for this rank within the block.

    Raises:
        ConfigError, IncompatibleError, CorruptError, StorageError: as `JoinedStream`.
    """
    with ExitStack() as opened:
        latents_dir = config.data.latent_cache.cache_dir
        latents = None if latents_dir is None else opened.enter_context(open_shard_set(latents_dir))
        yield opened.enter_context(_stream(config, teachers, latents, accelerator))


def _stream(
    config: DistillConfig,
    teachers: Sequence[ShardSet],
    latents: ShardSet | None,
    accelerator: Accelerator,
) -> JoinedStream:
    training = config.training
    per_rank = training.batch_size * training.gradient_accumulation_steps
    world = World.from_environment()
    return JoinedStream(
        teachers,
        latents=latents,
        text_fingerprint=told_by_main(
            accelerator, ModelFolder.resolve(config.text_source).text_fingerprint
        ),
        global_batch=per_rank * world.size,
        seed=training.seed,
        lanes=config.data.lanes,
        window=config.data.window,
        validation_fraction=training.validation.fraction,
        on_missing=config.data.on_missing,
        world=world,
        num_threads=config.data.reader_threads or usual_reader_threads(world),
        prefetch=config.data.prefetch_batches,
        pin_memory=accelerator.device.type == "cuda",
    )


def usual_reader_threads(world: World) -> int:
    """Return how many threads of a process read where the configuration leaves it open.

    All but one of the process's cores, 1 to 4: threads beyond them wait for the interpreter, and
    so does the training.
    """
    return min(_MAX_USUAL_READERS, max(1, world.num_cores - 1))


def load_student(
    settings: StudentSection, model_folder: ModelFolder, device: torch.device
) -> torch.nn.Module:
    """Load the UNet that is trained, in training mode and with gradients.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `models.unet.load_unet`.
    """
    dtype = torch.bfloat16 if settings.use_bf16 else torch.float32
    student = load_unet(model_folder, dtype, device)
    if settings.use_gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student.requires_grad_(True).train()


def require_same_table(student: NoiseSchedule, stream: JoinedStream) -> None:
    """Check that student and teachers mean the same noise by a timestep.

    Raises:
        IncompatibleError: naming the noise schedules.
    """
    if student.table_fingerprint() != stream.table_fingerprint:
        raise IncompatibleError(
            f"the student's noise schedule is {student.to_json()}",
            expected=f"the teachers' ᾱ, {stream.noise_schedules[0].to_json()}",
            where="student.checkpoint_path",
            action="start from a student with the teachers' noise schedule",
        )


def require_convertible(student: NoiseSchedule, teachers: Sequence[ShardSet]) -> None:
    """Check that every prediction can be converted to the student's type, at every timestep.

    Raises:
        IncompatibleError: when the student does not predict epsilon, but a teacher does at
            timesteps of too little signal; a run would otherwise meet this only after hours.
    """
    for teacher in teachers:
        source = noise_schedule_of(teacher).prediction_type
        last = recipe_of(teacher).max_timestep - 1
        signal = float(student.alphas_cumprod()[last]) ** 0.5
        if source == "epsilon" != student.prediction_type and signal < MIN_SIGNAL:
            raise IncompatibleError(
                f"teacher {teacher.id} predicts epsilon up to timestep {last}, "
                f"where √ᾱ = {signal:.4f}",
                expected=f"√ᾱ ≥ {MIN_SIGNAL} for a student that predicts {student.prediction_type}",
                where=str(teacher.location),
                action="build this teacher's predictions with a smaller cache.max_timestep",
            )


def warn_of_memorising(stream: JoinedStream, num_steps: int) -> None:
    """Warn when a run sees each (timestep, noise) pair of an image more than 8 times."""
    num_epochs, _ = stream.order.position_of(num_steps)
    num_draws = stream.order.num_draws
    if num_epochs > _MAX_VIEWS_OF_A_DRAW * num_draws:
        _log.warning(
            "%d steps are %d epochs over images of %d draws: the student will memorise them, and "
            "its training loss will mean nothing; build more draws (cache.draws), and go by "
            "the validation losses",
            num_steps,
            num_epochs,
            num_draws,
        )


def _open_teacher(cache_dir: Path, teacher_id: str) -> ShardSet:
    try:
        return open_shard_set(cache_dir / teacher_id)
    except ConfigError as error:
        raise ConfigError(
            f"there is no complete predictions set of teacher {teacher_id} ({error.found})",
            where=str(cache_dir / teacher_id),
            action="build it: accelerate launch tools/build_shards.py --config …",
        ) from error
