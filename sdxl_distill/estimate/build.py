"""What building a teacher's predictions will take, before it is started.

In: a configuration and the latents set, or the number of images. Out: forwards, shards,
exact bytes on disk, device memory. No weights are read and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.catalog.scan import count_images
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError
from sdxl_distill.estimate.network_memory import ForwardMemory, num_parameters, prediction_memory
from sdxl_distill.estimate.set_size import SetSize, planned_size, present_size
from sdxl_distill.models.text_encoder import text_geometry
from sdxl_distill.models.unet import unet_geometry
from sdxl_distill.sets.derived_shards import planned_after
from sdxl_distill.sets.legal_plan import require_legal_config, require_legal_plan
from sdxl_distill.sets.predictions_set import check_teacher, open_latents
from sdxl_distill.sets.teacher_sources import TeacherSources
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import (
    STORED_DTYPES,
    latents_schema,
    predictions_schema,
    text_schema,
)
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.storage.location import Location

_SIDECAR_BYTES: Final = 512
"""A caption of seventy words and the image's source; assumed where nothing is known."""


@dataclass(frozen=True)
class BuildEstimate:
    """What a predictions set takes.

    Attributes:
        predictions: the teacher's set.
        text: the set of its text encoders; shared by all teachers that have the same ones.
        latents: the latents set; shared by all teachers.
        has_latents: False while there is no latents set: images were then counted, and taken
            for images of the bucket with the most pixels.
        num_existing_shards: shards committed before.
        num_forwards: forward passes still to be done, of one record each.
        bucket: the largest resolution, which `memory` is for.
        memory: memory of one process: the UNet and its batch.
        text_encoder_bytes: memory of the device that is taken before the UNet is loaded.
        num_without_caption: image files without a caption anywhere; None where there are latents.
    """

    predictions: SetSize
    text: SetSize
    latents: SetSize
    has_latents: bool
    num_existing_shards: int
    num_forwards: int
    bucket: Bucket
    memory: ForwardMemory
    text_encoder_bytes: int
    num_without_caption: int | None


def estimate_predictions(config: BuilderConfig) -> BuildEstimate:
    """Look at a configuration's checkpoints and sets, and count.

    Raises:
        ConfigError, CorruptError, IncompatibleError: when a checkpoint or the latents set cannot
            be used, there is neither a latents set nor an image folder, or no reader would accept
            the sets that are planned.
    """
    sources = TeacherSources.of(config)
    check_teacher(config, sources)
    checkpoint, text_source = sources
    text, num_channels = text_geometry(text_source), unet_geometry(checkpoint).channels
    cache = config.cache

    # Every shard of the plan, and which of them are still to be built.
    shards, latents, num_without_caption = _plan(config)
    location = Location(cache.output_dir) / config.teacher.teacher_id
    committed = set[str]()
    if cache.skip_existing and location.is_folder():
        with location.open() as directory:
            committed = directory.names()
    missing = [shard for shard in shards if shard.name.idx not in committed]
    images = _sizes(shard for shard in shards if shard.name.draw == 0)
    bucket = _largest(Bucket(shard.name.width, shard.name.height) for shard in shards)
    stored = predictions_schema(cache.layout, STORED_DTYPES[cache.dtype], num_channels, *text)
    # Refuse what a build would refuse.
    if latents is None:
        require_legal_config(config, latents_schema(num_channels))
    require_legal_plan(config.teacher.teacher_id, stored, shards)
    dtype = torch.bfloat16 if config.teacher.use_bf16 else torch.float32
    return BuildEstimate(
        predictions=planned_size(stored, _sizes(shards)),
        text=planned_size(text_schema(*text), images),
        latents=present_size(latents)
        if latents is not None
        else planned_size(latents_schema(num_channels), images, sidecar_bytes=_SIDECAR_BYTES),
        has_latents=latents is not None,
        num_existing_shards=len(shards) - len(missing),
        num_forwards=sum(shard.num_records for shard in missing),
        bucket=bucket,
        memory=prediction_memory(checkpoint, dtype, cache.batch_size, bucket, text.num_tokens),
        text_encoder_bytes=torch.float32.itemsize
        * sum(map(num_parameters, text_source.text_encoders)),
        num_without_caption=num_without_caption,
    )


def _plan(config: BuilderConfig) -> tuple[list[PlannedShard], Manifest | None, int | None]:
    """Return all shards of the predictions set, and the manifest of its latents if they are built.

    If not, the third value is the number of images without a caption.
    """
    teacher_id, num_draws = config.teacher.teacher_id, config.cache.draws
    try:
        with open_latents(config) as latents:
            return planned_after(latents, teacher_id, num_draws), latents.manifest, None
    except ConfigError:  # not built yet: a plan is what a dry run is for
        num_images, num_without_caption = count_images(config.data.image_dir)
    bucket, per_shard = _largest(config.buckets), config.data.records_per_shard
    shards = [
        PlannedShard(
            ShardName(teacher_id, *bucket, number, draw), min(per_shard, num_images - start)
        )
        for draw in range(num_draws)
        for number, start in enumerate(range(0, num_images, per_shard))
    ]
    return shards, None, num_without_caption


def _largest(buckets: Iterable[Bucket]) -> Bucket:
    return max(buckets, key=lambda bucket: bucket.width * bucket.height)


def _sizes(shards: Iterable[PlannedShard]) -> list[tuple[int, int, int]]:
    return [(shard.name.width, shard.name.height, shard.num_records) for shard in shards]
