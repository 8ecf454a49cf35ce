"""What a predictions set holds: one teacher's answer for every image and draw.

Noise and timestep follow from the image's id, so every teacher is asked the same question.
UNet batches depend on the shard alone: its bytes do not show which worker built it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.set_builder import EncodedRecord
from sdxl_distill.core.noise import noise, noise_seed, timestep
from sdxl_distill.core.noise_schedule import NoiseSchedule, add_noise
from sdxl_distill.errors import NumericalError
from sdxl_distill.models.unet import predict
from sdxl_distill.runtime.device import CopyStream, HostCopy
from sdxl_distill.sets.derived_shards import holds_same_keys, latents_name
from sdxl_distill.shards.digest import tensor_digest
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.reader import ShardReader
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.safetensors_layout import TORCH_DTYPES
from sdxl_distill.shards.set_identity import NoiseRecipe
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet


class TeacherInput(NamedTuple):
    """The input of a teacher for B records, on the CPU.

    Attributes:
        keys: the records' keys.
        seeds: the seeds of their noise, int64 [B].
        timesteps: the timesteps, int64 [B].
        noise: the noise, float16 [B, C, H/8, W/8].
        latents: the scaled latents, float16 [B, C, H/8, W/8].
        time_ids: the sizes and crops, int32 [B, 6].
        encoder_hidden_states: the captions' token embeddings, float16 [B, T, D].
        pooled_embeds: the captions' pooled embeddings, float16 [B, P].
    """

    keys: list[str]
    seeds: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor
    latents: torch.Tensor
    time_ids: torch.Tensor
    encoder_hidden_states: torch.Tensor
    pooled_embeds: torch.Tensor


@dataclass(frozen=True)
class TeacherAnswer:
    """A prediction that may still be computed or copied.

    Attributes:
        teacher_input: the input that it answers.
        copy: the predictions, [B, C, H/8, W/8] in the stored dtype, on their way to the CPU.
    """

    teacher_input: TeacherInput
    copy: HostCopy

    def prediction(self) -> torch.Tensor:
        """Wait for the predictions and return them, [B, C, H/8, W/8] on the CPU.

        Raises:
            NumericalError: when one is NaN, infinite or beyond the dtype's range; names the keys.
        """
        stored = self.copy.result()
        is_finite = stored.isfinite().flatten(1).all(dim=1)
        if not bool(is_finite.all()):
            keys = [
                f"{key} (timestep {int(step)})"
                for key, step, good in zip(
                    self.teacher_input.keys, self.teacher_input.timesteps, is_finite, strict=True
                )
                if not good
            ]
            raise NumericalError(
                f"the prediction of {', '.join(keys)} is NaN, infinite or beyond {stored.dtype}",
                expected="finite predictions",
                where="teacher",
                action="try teacher.use_bf16: false and cache.dtype: fp32; if that does not help, "
                "the checkpoint is broken",
            )
        return stored


@dataclass(frozen=True)
class Teacher:
    """A frozen UNet and how it is run.

    Attributes:
        unet: loaded on `device`, possibly compiled.
        noise_schedule: the noise schedule of its checkpoint.
        device: the device that it runs on.
        dtype: the dtype that predictions are stored in.
        full_batch: the number of records that the UNet is always given, so that a compiled one
            has one shape per bucket: a shorter batch repeats its last one. None: as many as
            there are.
    """

    unet: nn.Module
    noise_schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    full_batch: int | None = None

    @torch.no_grad()
    def ask(self, teacher_input: TeacherInput) -> TeacherAnswer:
        """Start a prediction without waiting for the GPU."""
        with self._copies.copying() as copy:
            latents, noise, timesteps, hidden_states, pooled_embeds, time_ids = (
                copy(self._filled_up(tensor))
                for tensor in (
                    teacher_input.latents,
                    teacher_input.noise,
                    teacher_input.timesteps,
                    teacher_input.encoder_hidden_states,
                    teacher_input.pooled_embeds,
                    teacher_input.time_ids,
                )
            )
        noisy_latents = add_noise(latents, noise, self._alphas_cumprod[timesteps])
        prediction = predict(
            self.unet, noisy_latents, timesteps, hidden_states, pooled_embeds, time_ids
        )
        stored = prediction[: len(teacher_input.keys)].to(self.dtype).contiguous()
        return TeacherAnswer(teacher_input, HostCopy(stored))

    def predict(self, teacher_input: TeacherInput) -> torch.Tensor:
        """Return the predictions, as `TeacherAnswer.prediction` does."""
        return self.ask(teacher_input).prediction()

    @cached_property
    def _alphas_cumprod(self) -> torch.Tensor:
        return torch.from_numpy(self.noise_schedule.alphas_cumprod()).to(self.device)

    @cached_property
    def _copies(self) -> CopyStream:
        return CopyStream(self.device)

    def _filled_up(self, tensor: torch.Tensor) -> torch.Tensor:
        num_missing = (self.full_batch or 0) - len(tensor)
        if num_missing <= 0:
            return tensor
        return torch.cat([tensor, *[tensor[-1:]] * num_missing])


def read_teacher_input(
    latents: ShardSet,
    text: ShardSet,
    recipe: NoiseRecipe,
    name: ShardName,
    records: Sequence[int],
    *,
    pin_memory: bool = False,
) -> TeacherInput:
    """Return the input of any teacher for some records of a shard.

    Args:
        latents: the latents set.
        text: the text set of the same latents.
        recipe: the base seed and the range of timesteps.
        name: the name of the predictions shard: bucket, number and draw.
        records: the numbers of the records in the shard.
        pin_memory: allocate the large tensors in page-locked memory, from which a GPU copies by
            itself.

    Raises:
        CorruptError, StorageError: when latents or embeddings cannot be read.
    """
    # What follows from the ids: seeds and timesteps.
    latents_reader = latents.reader(latents_name(latents, name))
    text_reader = text.reader(latents_name(text, name))
    ids = [latents_reader.index.image_id(record) for record in records]
    seeds = [noise_seed(image_id, recipe.base_seed, name.draw) for image_id in ids]
    steps = [
        timestep(image_id, recipe.base_seed, name.draw, recipe.min_timestep, recipe.max_timestep)
        for image_id in ids
    ]

    def read(reader: ShardReader, tensor_name: str) -> torch.Tensor:
        place = reader.index.header.place(tensor_name)
        shape, dtype = (len(records), *place.shape), TORCH_DTYPES[place.dtype]
        out = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
        reader.read_records(records, tensor_name, out)
        return out

    # Latents as they are stored, noise drawn from the seeds, straight into the batch.
    latents_batch = read(latents_reader, "latents")
    noise_batch = torch.empty(latents_batch.shape, dtype=torch.float16, pin_memory=pin_memory)
    num_channels = latents_batch.shape[1]
    for row, seed in zip(noise_batch.numpy(), seeds, strict=True):
        row[...] = noise(seed, name.width, name.height, num_channels)
    return TeacherInput(
        keys=[latents_reader.index.key(record) for record in records],
        seeds=torch.tensor(seeds, dtype=torch.int64),
        timesteps=torch.tensor(steps, dtype=torch.int64),
        noise=noise_batch,
        latents=latents_batch,
        time_ids=read(latents_reader, "time_ids"),
        encoder_hidden_states=read(text_reader, "encoder_hidden_states"),
        pooled_embeds=read(text_reader, "pooled_embeds"),
    )


class PredictionsContent:
    """Content of a predictions set, for `set_builder.build_shards`.

    Args:
        teacher: the teacher that predicts.
        latents: the set that the teacher follows.
        text: the text set of the same latents.
        recipe: the base seed and the range of timesteps.
        batch_size: the number of records that the UNet predicts at once.
    """

    def __init__(
        self,
        teacher: Teacher,
        latents: ShardSet,
        text: ShardSet,
        recipe: NoiseRecipe,
        batch_size: int,
    ) -> None:
        self._teacher = teacher
        self._latents = latents
        self._text = text
        self._recipe = recipe
        self._batch_size = batch_size

    def accepts(self, index: ShardIndex) -> bool:
        """Whether a tar holds exactly the keys of its latents shard."""
        return holds_same_keys(index, self._latents)

    def read(self, shard: PlannedShard) -> Iterator[TeacherInput]:
        """Yield the teacher's input for the records of a shard."""
        for start in range(0, shard.num_records, self._batch_size):
            records = range(start, min(start + self._batch_size, shard.num_records))
            yield read_teacher_input(
                self._latents,
                self._text,
                self._recipe,
                shard.name,
                records,
                pin_memory=self._teacher.device.type == "cuda",
            )

    def compute(self, batch: TeacherInput) -> TeacherAnswer:
        """Start the UNet."""
        return self._teacher.ask(batch)

    def encode(self, result: TeacherAnswer, header: RecordHeader) -> Iterator[EncodedRecord]:
        """Yield one record for each image, with the tensors that the layout has."""
        teacher_input, prediction = result.teacher_input, result.prediction()
        num_records, _, height, width = prediction.shape
        resolution = torch.tensor([8 * width, 8 * height], dtype=torch.int32)
        tensors = {
            "teacher_pred": prediction,
            "timestep": teacher_input.timesteps[:, None],
            "seed": teacher_input.seeds[:, None],
            "resolution": resolution.expand(num_records, 2),
        }
        if header.recreates_noise:
            digests = [tensor_digest(noise) for noise in teacher_input.noise.numpy()]
        else:
            digests = [None] * num_records
            tensors |= {
                "noise": teacher_input.noise,
                "encoder_hidden_states": teacher_input.encoder_hidden_states,
                "pooled_embeds": teacher_input.pooled_embeds,
            }
        records = header.encode_batch(tensors)
        for key, record, digest in zip(teacher_input.keys, records, digests, strict=True):
            yield EncodedRecord(key, record, noise_digest=digest)
