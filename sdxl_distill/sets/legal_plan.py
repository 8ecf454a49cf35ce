"""Refuses a configuration whose sets no reader would accept, before anything is scanned or built.

Shards follow the latents set, so the way it is cut decides how large the shards of all teachers
become: what can be known of them is checked when the latents are planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Final

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.catalog.segment import CatalogRow
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import DistillError
from sdxl_distill.limits import MAX_SHARD_BYTES, MAX_SHARDS
from sdxl_distill.models.text_encoder import text_geometry
from sdxl_distill.models.unet import unet_geometry
from sdxl_distill.sets.latents_content import sidecar_of
from sdxl_distill.sets.teacher_sources import TeacherSources
from sdxl_distill.shards.legal_set import Remedy, ShardLoad, most_records_in, require_legal_shards
from sdxl_distill.shards.record import (
    STORED_DTYPES,
    RecordSchema,
    predictions_schema,
    text_schema,
)

_COMPACT: Final = "; cache.layout: compact makes records a quarter of the size"
_DRAWS: Final = "; fewer cache.draws make fewer shards"
_NOT_YET: Final = Remedy(if_large=_COMPACT, if_many=_DRAWS)
_FOLLOWING: Final = _NOT_YET._replace(besides=" and build the latents again with --rebuild")
_LEAST_SIDECAR_BYTES: Final = 200  # with an empty caption
_BYTES_PER_PIXEL: Final = 1  # four channels at an eighth of each side: noise and float32 take 0.4
_TEXT_BYTES: Final = 2 << 20  # three times SDXL's


def most_images(config: BuilderConfig) -> int:
    """Return how many images the sets of a configuration can hold at most."""
    return MAX_SHARDS // config.cache.draws * config.data.records_per_shard


def require_legal_config(config: BuilderConfig, schema: RecordSchema) -> None:
    """Refuse shards that would be too large in some bucket when they are full.

    The teacher's own sets are checked if its folder is on this machine.

    Args:
        config: the builder's configuration.
        schema: the latents' schema.

    Raises:
        ConfigError: naming the key and the value that works.
    """
    count, buckets = config.data.records_per_shard, config.buckets
    sidecars = (_LEAST_SIDECAR_BYTES,) * count
    full = [ShardLoad(*bucket, count, sidecars) for bucket in buckets]
    bare = [ShardLoad(*bucket, count) for bucket in buckets]
    following = _following_schemas(config)
    most = min(
        [
            most_records_in(schema, full),
            *(most_records_in(each, bare) for each in following.values()),
        ]
    )
    require_legal_shards("latents", schema, full, Remedy(most=most))
    for set_id, each in following.items():
        is_compact = set_id == "text" or config.cache.layout == "compact"
        remedy = Remedy(most=most) if is_compact else _NOT_YET._replace(most=most)
        require_legal_shards(set_id, each, bare, remedy)


def require_legal_rows(
    schema: RecordSchema, draws: int, num_shards: Mapping[Bucket, int], rows: Sequence[CatalogRow]
) -> None:
    """Refuse to catalogue images whose shards no reader would accept.

    Args:
        schema: the latents' schema.
        draws: the number of draws to be predicted of each image.
        num_shards: the number of shards that each bucket has already.
        rows: new images, sorted by bucket and shard.

    Raises:
        ConfigError: naming the key and the value that works.
    """
    loads: list[ShardLoad] = []
    for (bucket, _), group in groupby(rows, key=lambda row: (row.bucket, row.shard)):
        sizes = tuple(len(sidecar_of(row)) for row in group)
        loads.append(ShardLoad(*bucket, len(sizes), sizes))
    require_legal_shards("latents", schema, loads, Remedy())
    existing = [ShardLoad(*bucket, 0) for bucket, count in num_shards.items() for _ in range(count)]
    bare = [load._replace(sidecar_sizes=()) for load in loads]
    require_legal_shards(
        "predictions", schema, existing + bare, Remedy(if_many=_DRAWS), draws=draws
    )


def require_legal_plan(set_id: str, schema: RecordSchema, shards: Iterable[PlannedShard]) -> None:
    """Refuse a set that follows a latents set and would have shards that no reader accepts.

    Raises:
        ConfigError: naming the key and the value that works.
    """
    loads = (ShardLoad(each.name.width, each.name.height, each.num_records) for each in shards)
    is_full = any(spec.name == "noise" for spec in schema.tensors)
    remedy = _FOLLOWING if is_full else _FOLLOWING._replace(if_large="")
    require_legal_shards(set_id, schema, loads, remedy)


def _following_schemas(config: BuilderConfig) -> dict[str, RecordSchema]:
    """Return the schemas of the text and predictions sets, if their shards could be too large.

    Their sizes come from the tokenizers, whose library takes seconds to import.
    """
    schemas: dict[str, RecordSchema] = {}
    largest = max(bucket.width * bucket.height for bucket in config.buckets) * _BYTES_PER_PIXEL
    if config.data.records_per_shard * (largest + _TEXT_BYTES) <= MAX_SHARD_BYTES:
        return schemas
    cache = config.cache
    with suppress(DistillError):  # the teacher's own builder says what is wrong with it
        sources = TeacherSources.of(config)
        text, unet = text_geometry(sources.text), unet_geometry(sources.teacher)
        schemas["text"] = text_schema(*text)
        schemas[config.teacher.teacher_id] = predictions_schema(
            cache.layout, STORED_DTYPES[cache.dtype], unet.channels, *text
        )
    return schemas
