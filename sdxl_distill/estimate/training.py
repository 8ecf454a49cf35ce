"""What a training run will take, before it is started: device memory, disk, forwards.

In: a configuration and its student's `config.json`; no weights are read. The step that is
counted is the trainer's own, on tensors without storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from sdxl_distill.config.distill import DistillConfig, TrainingSection
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError
from sdxl_distill.estimate.network_memory import StorageCount, counted_memory, weightless
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import text_geometry
from sdxl_distill.models.unet import unet_geometry
from sdxl_distill.optimizer.adamw import AdamW, clip_factor, global_grad_norm
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.train.trainer import followed_weights, make_ema, make_optimizer
from sdxl_distill.train.trial_step import batch_of_zeros, step_of

_DEFAULT_BUCKET: Final = Bucket(1024, 1024)
_EXPORT_BYTES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process's training step, and where the average lies.

    Attributes:
        weights: the student's weights.
        gradients: the gradients, in the weights' dtype.
        activations: the most that forward and backward add to weights, gradients and states.
        optimizer: the optimizer's states, and the remainders of exact masters.
        ema: this process's share of the float32 average; 0 when it is off.
        ema_on_device: True if the average is next to the student.
        peak: the most that is live on the device at once, including while the optimizer works.
    """

    weights: int
    gradients: int
    activations: int
    optimizer: int
    ema: int
    ema_on_device: bool
    peak: int


def training_memory(
    config: DistillConfig,
    checkpoint: ModelFolder,
    bucket: Bucket,
    num_tokens: int,
    num_processes: int = 1,
) -> TrainingMemory:
    """Count a training step of one process, on CUDA unless the configuration says "cpu".

    Args:
        config: the run's configuration.
        checkpoint: the student's checkpoint.
        bucket: the resolution; more pixels take more.
        num_tokens: the tokens of one caption.
        num_processes: the number of processes, which share the average.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when the student's configuration cannot
            be used.
    """
    device_type = "cpu" if config.device == "cpu" else "cuda"
    geometry, noise_schedule = unet_geometry(checkpoint), checkpoint.noise_schedule()
    with counted_memory() as count:
        student = weightless(checkpoint.unet, _weights_dtype(config))
        if config.student.use_gradient_checkpointing:
            student.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        student.requires_grad_(True).train()
        weights = count.live_bytes
        optimizer = make_optimizer(
            _uncompiled(config.training), student.named_parameters(), device_type
        )
        states = count.live_bytes - weights
        ema_on_device = device_type == "cpu" or config.student.ema_device == "auto"
        ema = make_ema(config.student, student, 0, num_processes) if ema_on_device else None
        held = count.live_bytes

        step = step_of(config, student, noise_schedule, torch.device("cpu"))
        num_records = config.training.batch_size
        micro_batch = batch_of_zeros(config, geometry, bucket, num_tokens, num_records)
        count.restart_peak()
        # From the second micro-batch on all gradients are there while activations pile up.
        for _ in range(min(2, config.training.gradient_accumulation_steps)):
            step.backward(micro_batch, num_records)
        backward_peak = count.peak_bytes
        gradients = sum(w.grad.nbytes for w in student.parameters() if w.grad is not None)
        _update(config, optimizer, student, count)
        if ema is not None:
            ema.update(followed_weights(student.named_parameters(), optimizer), 0)
    num_weights = sum(weight.numel() for weight in student.parameters())
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        activations=backward_peak - held - gradients,
        optimizer=states,
        ema=4 * -(-num_weights // num_processes) if config.student.use_ema else 0,
        ema_on_device=ema_on_device,
        peak=max(backward_peak, count.peak_bytes),
    )


@dataclass(frozen=True)
class TrainingEstimate:
    """What a run takes.

    Attributes:
        memory: memory of one process.
        bucket: the largest resolution, which `memory` is for.
        num_processes: processes of the launch.
        num_records: records that all steps of all processes train on.
        num_images: images of the joined sets; None while a set is not there.
        num_shards: shards of all teachers' sets.
        read_bytes: size of all teachers' tars, read once per epoch.
        checkpoint_bytes: size of one checkpoint.
        num_checkpoints: checkpoints on the disk at once, including the one being written.
        export_bytes: size of the exported UNet.
    """

    memory: TrainingMemory
    bucket: Bucket
    num_processes: int
    num_records: int
    num_images: int | None
    num_shards: int
    read_bytes: int
    checkpoint_bytes: int
    num_checkpoints: int
    export_bytes: int

    @property
    def num_epochs(self) -> float | None:
        """Passes over the images; None while a set is not there."""
        return self.num_records / self.num_images if self.num_images else None


def estimate_training(config: DistillConfig, num_processes: int) -> TrainingEstimate:
    """Look at student and sets of a configuration and count.

    Args:
        config: the run's configuration.
        num_processes: the number of processes that will train together.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when the student's configuration, or a set
            that is there, cannot be used.
    """
    checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
    num_tokens = text_geometry(ModelFolder.resolve(config.text_source)).num_tokens
    manifests = [_manifest(Path(each.cache_dir) / each.teacher_id) for each in config.teachers]
    # The largest resolution of the sets that are built takes the most memory.
    there = [manifest for manifest in manifests if manifest is not None]
    bucket = largest_bucket(there)
    memory = training_memory(config, checkpoint, bucket, num_tokens, num_processes)
    # Everything else is counted from it and from the manifests.
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps * num_processes
    num_weights = memory.weights // _weights_dtype(config).itemsize
    averages = 4 * num_weights if config.student.use_ema else 0
    is_complete = len(there) == len(manifests)
    return TrainingEstimate(
        memory=memory,
        bucket=bucket,
        num_processes=num_processes,
        num_records=training.num_steps * per_step,
        num_images=min(each.num_records // each.draws for each in there) if is_complete else None,
        num_shards=sum(len(each.shards) for each in there),
        read_bytes=sum(shard.tar_bytes for each in there for shard in each.shards),
        checkpoint_bytes=memory.weights + memory.optimizer + averages,
        num_checkpoints=training.keep_checkpoints + 1,
        export_bytes=num_weights * _EXPORT_BYTES[config.export.dtype],
    )


def largest_bucket(manifests: list[Manifest]) -> Bucket:
    """Return the resolution with the most pixels in some sets; SDXL's square if there are none."""
    buckets = {Bucket(*entry[:2]) for each in manifests for entry in each.shards}
    return max(buckets, key=lambda bucket: bucket.width * bucket.height, default=_DEFAULT_BUCKET)


def _manifest(path: Path) -> Manifest | None:
    try:
        with open_shard_set(path) as shard_set:
            return shard_set.manifest
    except ConfigError:  # not built yet: a plan is what a dry run is for
        return None


def _weights_dtype(config: DistillConfig) -> torch.dtype:
    return torch.bfloat16 if config.student.use_bf16 else torch.float32


def _uncompiled(settings: TrainingSection) -> TrainingSection:
    """Without storage there is nothing to compile for; compiled steps take less, if anything."""
    return settings.model_copy(update={"compile_optimizer": False})


def _update(
    config: DistillConfig, optimizer: AdamW, student: nn.Module, count: StorageCount
) -> None:
    """Clip, and step the largest parameter: its slices take as much memory as any."""
    count.restart_peak()
    weights = list(student.parameters())
    grad_norm = global_grad_norm(weights)
    gradients = [weight.grad for weight in weights]
    largest = max(weights, key=torch.Tensor.numel)
    for weight in weights:
        if weight is not largest:
            weight.grad = None
    max_norm = config.training.max_grad_norm
    optimizer.step(1.0 if max_norm is None else clip_factor(grad_norm, max_norm))
    del gradients
