"""Records per second of this machine, predicting or training, with inputs of zeros."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import torch

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import text_geometry
from sdxl_distill.models.unet import UnetInput, compile_unet, unet_geometry
from sdxl_distill.optimizer.adamw import clip_factor, global_grad_norm
from sdxl_distill.runtime.device import allow_tf32, resolve_device
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.predictions_content import TeacherAnswer, TeacherInput
from sdxl_distill.sets.predictions_set import load_teacher
from sdxl_distill.sets.teacher_sources import TeacherSources
from sdxl_distill.train.session import load_student
from sdxl_distill.train.trainer import make_optimizer
from sdxl_distill.train.trial_step import batch_of_zeros, step_of

_MIN_SECONDS: Final = 5.0
_MIN_REPEATS: Final = 3
_BATCHES_IN_FLIGHT: Final = 2


def measure_build_rate(config: BuilderConfig, bucket: Bucket) -> float:
    """Return records per second of one process, without reading and writing.

    Args:
        config: the builder's configuration.
        bucket: the resolution of all records.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when the teacher cannot be loaded.
    """
    device = resolve_device(config.device, World.from_environment().local_rank)
    allow_tf32(config.tf32)
    checkpoint, text_source = TeacherSources.of(config)
    noise_schedule = checkpoint.noise_schedule(
        config.teacher.prediction_type, config.teacher.zero_terminal_snr
    )
    # The builder's own teacher.
    teacher = load_teacher(config, checkpoint, noise_schedule, device)
    num_tokens = text_geometry(text_source).num_tokens
    batch_size = config.cache.batch_size
    asked = UnetInput.zeros(unet_geometry(checkpoint), batch_size, bucket, num_tokens)
    teacher_input = TeacherInput(
        keys=[""] * batch_size,
        seeds=torch.zeros(batch_size, dtype=torch.int64),
        noise=torch.zeros_like(asked.latents),
        **asked._asdict(),
    )

    teacher.predict(teacher_input)  # the first call allocates, and compiles if asked to
    # As in a build, some batches are in flight while the next is asked for.
    answers = deque[TeacherAnswer]()
    started = time.perf_counter()
    num_done = 0
    while num_done < _MIN_REPEATS or time.perf_counter() - started < _MIN_SECONDS:
        answers.append(teacher.ask(teacher_input))
        if len(answers) > _BATCHES_IN_FLIGHT:
            answers.popleft().prediction()
        num_done += 1
    for answer in answers:
        answer.prediction()
    return num_done * batch_size / (time.perf_counter() - started)


def measure_training_rate(config: DistillConfig, bucket: Bucket) -> float:
    """Return records per second of one process: forward, backward, clipping and optimizer.

    Args:
        config: the run's configuration.
        bucket: the resolution of all records.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when the student cannot be loaded.
    """
    device = resolve_device(config.device, World.from_environment().local_rank)
    allow_tf32(config.tf32)
    checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
    # The trainer's own student, optimizer and step.
    student = load_student(config.student, checkpoint, device)
    if config.training.compile != "none":
        compile_unet(student, config.training.compile, 1)
    optimizer = make_optimizer(config.training, student.named_parameters(), device.type)
    step = step_of(config, student, checkpoint.noise_schedule(), device)
    num_tokens = text_geometry(ModelFolder.resolve(config.text_source)).num_tokens
    num_records = config.training.batch_size * config.training.gradient_accumulation_steps
    batch = batch_of_zeros(config, unet_geometry(checkpoint), bucket, num_tokens, num_records)

    def run_step() -> None:
        step.backward(batch, config.training.batch_size)
        grad_norm = global_grad_norm(student.parameters())
        optimizer.step(clip_factor(grad_norm, config.training.max_grad_norm or 1.0))
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run_step()  # the first step allocates, and compiles if asked to
    started = time.perf_counter()
    num_done = 0
    while num_done < _MIN_REPEATS or time.perf_counter() - started < _MIN_SECONDS:
        run_step()
        num_done += 1
    return num_done * len(batch) / (time.perf_counter() - started)
