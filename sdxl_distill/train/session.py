"""From a configuration to a trained student: everything a run needs, opened from cheap to dear.

What does not fit is refused before any weights are read: sets among each other, then student
and sets, then the checkpoint that is resumed.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.device import resolve_device
from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.models.checkpoint import Checkpoint
from sdxl_distill.models.unet import load_unet
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.trainer import Trainer, TrainSummary
from sdxl_distill.world import World

_log = logging.getLogger(__name__)


def train(config: DistillConfig, resume: str | None = None) -> TrainSummary:
    """Train the student of a configuration, or go on with it.

    Args:
        config: of the run.
        resume: `latest`, the path of a checkpoint, or None for a new run. `latest` of a run
            without a checkpoint starts it, so that a requeued job needs no other command.

    Raises:
        ConfigError: for a run that exists already, a missing set or checkpoint, or a number of
            processes that does not divide the lanes.
        IncompatibleError: when sets, student and checkpoint do not belong together.
        CorruptError, StorageError: when something cannot be read or written.
        NumericalError: when loss or gradients are not finite.
        Preempted: when a signal asked to stop; the state is saved.
    """
    folder = RunFolder.of(config)
    is_new = resume is None or (resume == "latest" and not folder.checkpoints().steps())
    if resume is None:
        folder.require_new()
    accelerator = make_accelerator(config)
    with open_stream(config, accelerator) as stream:
        checkpoint = Checkpoint.resolve(config.student.checkpoint_path)
        noise_schedule = checkpoint.noise_schedule()
        require_same_table(noise_schedule, stream)
        trainer = Trainer(
            config,
            load_student(config, checkpoint, accelerator.device),
            noise_schedule,
            checkpoint.unet_fingerprint(),
            stream,
            accelerator,
        )
        if not is_new:
            trainer.resume(str(resume))
            _log.info("resumed at step %d", trainer.position.global_step)
        if accelerator.is_main_process:
            folder.write(config, {**trainer.identity, "stream": stream.schedule.identity()})
        return trainer.run()


def make_accelerator(config: DistillConfig) -> Accelerator:
    """Join the ranks of the launch.

    Mixed precision stays off whatever the launcher says: the weights' own dtype decides.

    Raises:
        ConfigError: when the configured device is not there, or not the launcher's.
    """
    world = World.from_environment()
    device = resolve_device(config.device, world.local_rank)
    # DDP would keep a second copy of all gradients without the views.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
    if accelerator.num_processes != world.size:
        raise ConfigError(
            f"the launcher started {world.size} processes, but they do not know each other",
            where="launcher",
            action="on CPUs launch with ACCELERATE_USE_CPU=true and --multi_gpu "
            "--num_processes N, see launch/accelerate",
        )
    return accelerator


def open_stream(config: DistillConfig, accelerator: Accelerator) -> JoinedStream:
    """Open the joined sets of all teachers for this rank.

    Raises:
        ConfigError, IncompatibleError, CorruptError, StorageError: as `JoinedStream`.
    """
    training = config.training
    per_rank = training.batch_size * training.gradient_accumulation_steps
    latents_dir = config.data.latent_cache.cache_dir
    return JoinedStream(
        [_open_teacher(Path(each.cache_dir), each.teacher_id) for each in config.teachers],
        latents=None if latents_dir is None else open_shard_set(latents_dir),
        text_fingerprint=Checkpoint.resolve(config.text_source).text_fingerprint(),
        global_batch=per_rank * accelerator.num_processes,
        seed=training.seed,
        lanes=config.data.lanes,
        window=config.data.window,
        validation_fraction=training.validation.fraction,
        on_missing=config.data.on_missing,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        num_threads=config.data.reader_threads,
        prefetch=config.data.prefetch_batches,
        pin_memory=accelerator.device.type == "cuda",
    )


def load_student(
    config: DistillConfig, checkpoint: Checkpoint, device: torch.device
) -> torch.nn.Module:
    """Load the UNet that is trained, in training mode and with gradients.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `models.unet.load_unet`.
    """
    dtype = torch.bfloat16 if config.student.use_bf16 else torch.float32
    student = load_unet(checkpoint, dtype, device)
    if config.student.use_gradient_checkpointing:
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


def _open_teacher(cache_dir: Path, teacher_id: str) -> ShardSet:
    try:
        return open_shard_set(cache_dir / teacher_id)
    except ConfigError as error:
        raise ConfigError(
            f"there is no complete predictions set of teacher {teacher_id} ({error.found})",
            where=str(cache_dir / teacher_id),
            action="build it: accelerate launch tools/build_shards.py --config …",
        ) from error
