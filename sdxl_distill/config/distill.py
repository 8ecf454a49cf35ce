"""The schema of a training file: what `train` and `export_student` are told."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sdxl_distill.config.nested_folder import Key, require_beside_sets
from sdxl_distill.config.section import (
    BrokenRule,
    Compile,
    Count,
    Device,
    NonNegative,
    Place,
    Positive,
    SafeName,
    Section,
    Seed,
    StoredDtype,
)
from sdxl_distill.limits import MAX_STEPS

Decay = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_USUAL_WARMUP_STEPS = 200

_log = logging.getLogger(__name__)


class RunSection(Section):
    """Name and place of the run."""

    name: SafeName
    """Name of the run folder and of the run in TensorBoard."""
    output_root: Place = ".output/distill"
    """Folder of all runs; this one is `{output_root}/{name}`."""


class StudentSection(Section):
    """The student: the model that is trained."""

    checkpoint_path: Place
    """What it starts from: a local diffusers folder or a hub id."""
    text_encoder_id: Place | None = None
    """Checkpoint whose text embeddings condition it; null takes `student.checkpoint_path`."""
    use_bf16: bool = True
    """Keep the weights in bfloat16, with stochastic rounding; false keeps them in float32."""
    use_gradient_checkpointing: bool = True
    """Compute activations twice instead of keeping them: much less memory, a third slower."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights and export it."""
    ema_decay: Decay = 0.9999
    """Decay per step once warm; step s uses min(ema_decay, (1 + s) / (10 + s))."""
    ema_device: Literal["auto", "cpu"] = "auto"
    """Where the float32 average is kept: cpu in main memory; auto beside the student where it fits,
    else in main memory too."""
    ema_every: Annotated[int, Field(ge=1, le=1000)] = 8
    """Steps after which each weight is averaged again, by the product of their decays; another part
    of the weights at every step. While the decay warms up it is more often."""


class TeacherCacheSection(Section):
    """One teacher's predictions set."""

    teacher_id: SafeName
    """Name of the teacher, as its set was built."""
    cache_dir: Place = "./cache/teacher_predictions"
    """Folder that holds the teacher's folder."""
    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Share in the average that the student learns; all weights are scaled to sum to 1."""


class LatentsPlaceSection(Section):
    """Where the latents set is."""

    cache_dir: Place | None = None
    """Folder of the latents set; null takes the place that the predictions' manifests name."""


class DistillDataSection(Section):
    """How the shard sets are joined and streamed."""

    latent_cache: LatentsPlaceSection = LatentsPlaceSection()
    on_missing: Literal["error", "intersect"] = "error"
    """When a set lacks shards that another has: stop, or train on what all sets have."""
    on_change: Literal["error", "next_epoch"] = "error"
    """When a resumed run finds other shards: stop, or continue at the start of the next epoch."""
    window: Count = 16_384
    """Records of one bucket that are shuffled together, over all lanes."""
    lanes: Count | None = None
    """Fixed slices of the records that ranks own; must divide the global batch and be a multiple of
    the number of processes. Null takes the global batch's largest divisor up to 64."""
    reader_threads: Count | None = None
    """Threads of one process that read shards. Null takes 1 to 4, and leaves one of the process's
    processor cores to the training: more threads would only get in its way."""
    prefetch_batches: Count = 4
    """Batches, each a share of one step, that a process reads ahead."""


class ValidationSection(Section):
    """Images that are never trained on."""

    fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Share of the images held out, chosen by their ids and so the same in every run."""
    every: Count = 500
    """Steps between two validations."""
    max_records: Count | None = 256
    """Most images in one validation: always the same ones, from every bucket its share. Null takes
    all that are held out."""


class TensorboardSection(Section):
    """TensorBoard logs."""

    base_dir: Place = "./logs/tensorboard/distill"
    """Folder of all runs' logs; this one's is `{base_dir}/{run.name}`."""


class TrainingSection(Section):
    """The optimisation."""

    batch_size: Count = 4
    """Records in one forward pass of one process."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per step; global batch = batch_size × this × number of processes."""
    num_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 10_000
    """Optimizer steps of the whole run."""
    lr: Positive = 5e-6
    """Learning rate after the warm-up."""
    loss_type: Literal["mse", "huber", "smooth_l1"] = "mse"
    """The loss that is minimised between the student and the teachers' average."""
    huber_delta: Positive = 0.1
    """Difference at which huber and smooth_l1 turn from squared to linear."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the learning rate rises from 0. Null takes 200, or a tenth of the steps of a
    run of less than 2,000."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after the warm-up. Of cosine and linear `num_steps` is a part:
    such a run is not prolonged when it is resumed."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate of cosine and linear, as a share of `lr`."""
    max_grad_norm: Positive | None = 1.0
    """Gradients of a larger global norm are scaled down to it; null never clips."""
    adam_beta1: Decay = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Decay = 0.999
    """Decay of AdamW's second moment."""
    adam_eps: Positive = 1e-8
    """Added to the square root of AdamW's second moment."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay: a step takes `lr` × this off each weight, which pulls the
    student away from what its teachers share."""
    optimizer: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    """Moments in float32 (adamw) or 8 bits (adamw_8bit); auto is 8 bits on CUDA, else float32."""
    exact_masters: Literal["auto"] | bool = "auto"
    """Keep the 16 bits that bfloat16 weights lack: exact float32 weights, for 2 more bytes each.
    auto keeps them where memory allows, and as the checkpoint did that a run goes on from."""
    compile: Compile = "none"
    """Compile the student with torch.compile. regional: its repeated blocks, once for all buckets,
    in a minute or two. full: the whole network, once for each bucket, in a minute or two each."""
    compile_optimizer: bool = True
    """On CUDA, compile the optimizer's step: a minute at the start, and then milliseconds instead
    of most of a second per step. Needs a C compiler; no effect on a CPU."""
    seed: Seed = 42
    """Seed of the stream order and of stochastic rounding."""
    log_every: Count = 10
    """Steps between two points in the logs."""
    checkpoint_every: Count = 1000
    """Steps between two checkpoints; the last step and a request to stop save one too."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least two, so that a damaged one has a fallback."""
    validation: ValidationSection = ValidationSection()
    tensorboard: TensorboardSection = TensorboardSection()

    @property
    def num_warmup_steps(self) -> int:
        """Steps in which the learning rate rises from 0."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(_USUAL_WARMUP_STEPS, self.num_steps // 10)

    @model_validator(mode="after")
    def _check_warmup(self) -> TrainingSection:
        if self.warmup_steps is not None and self.warmup_steps > self.num_steps:
            raise BrokenRule(
                f"{self.warmup_steps}",
                expected=f"at most num_steps, {self.num_steps}",
                key=("warmup_steps",),
            )
        return self


class ExportSection(Section):
    """The model folder written at the end."""

    dtype: StoredDtype = "fp16"
    """Dtype that the exported UNet is stored in; the VAE and the text encoders stay as their source
    stores them."""
    vae_id: Place | None = None
    """Checkpoint whose VAE is exported; null takes `student.checkpoint_path`."""


class DistillConfig(Section):
    """Configuration of `train` and `export_student`."""

    device: Device = "auto"
    """Where the student trains: auto is CUDA if available, else the CPU; cuda requires it."""
    tf32: bool = True
    """Let a GPU multiply float32 matrices with 10 bits of mantissa: several times faster, with a
    relative error of about 5e-4. No effect on bfloat16 weights or on CPUs."""
    run: RunSection
    student: StudentSection
    teachers: Annotated[tuple[TeacherCacheSection, ...], Field(strict=False, min_length=1)]
    """The predictions sets whose weighted average the student learns; at least one."""
    data: DistillDataSection = DistillDataSection()
    training: TrainingSection = TrainingSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _check_teachers(self) -> DistillConfig:
        names = [teacher.teacher_id for teacher in self.teachers]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise BrokenRule(
                    f'"{name}" is the id of teachers[{names.index(name)}] too',
                    expected="every teacher once",
                    key=("teachers", number, "teacher_id"),
                )
        return self

    @model_validator(mode="after")
    def _check_masters(self) -> DistillConfig:
        if self.training.exact_masters is True and not self.student.use_bf16:
            raise BrokenRule(
                "true, but float32 weights are exact already",
                expected="false, or student.use_bf16: true",
                key=("training", "exact_masters"),
            )
        return self

    @model_validator(mode="after")
    def _check_folders(self) -> DistillConfig:
        sets = {
            f"teacher {teacher.teacher_id}": Path(teacher.cache_dir) / teacher.teacher_id
            for teacher in self.teachers
        }
        if self.data.latent_cache.cache_dir is not None:
            sets["the latents set"] = Path(self.data.latent_cache.cache_dir)
        folders: dict[Key, str | Path] = {
            ("run", "output_root"): self.run.output_root,
            ("training", "tensorboard", "base_dir"): self.training.tensorboard.base_dir,
        }
        require_beside_sets(sets, folders)
        return self

    @property
    def vae_source(self) -> str:
        """Checkpoint whose VAE is exported with the student."""
        return self.export.vae_id or self.student.checkpoint_path

    @property
    def text_source(self) -> str:
        """Checkpoint whose text embeddings condition the student."""
        return self.student.text_encoder_id or self.student.checkpoint_path

    def normalised_weights(self) -> tuple[float, ...]:
        """Return the teachers' weights scaled to sum to 1; logs a warning if they did not."""
        weights = [teacher.weight for teacher in self.teachers]
        total = math.fsum(weights)
        if not math.isclose(total, 1.0, rel_tol=1e-6):
            _log.warning("the teachers' weights sum to %g; they are scaled to sum to 1", total)
        return tuple(weight / total for weight in weights)
