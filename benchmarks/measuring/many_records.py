"""Sets of very many very small records, as the builder of a configuration expects to find them.

Latents and text are zeros. Predictions come from the product's own loop, around a UNet that
costs nothing: all that is left is reading, noise, encoding, writing and committing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring.tiny_job import TinyJob, quiet
from torch import nn

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.set_builder import EncodedRecord, ShardContent, build_set
from sdxl_distill.core.image_id import image_id
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.derived_shards import planned_after
from sdxl_distill.sets.latents_set import latents_identity
from sdxl_distill.sets.predictions_content import PredictionsContent, Teacher, TeacherInput
from sdxl_distill.sets.predictions_set import open_latents, predictions_identity
from sdxl_distill.sets.text_set import text_identity
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import FINGERPRINT, RecordHeader, encode_record
from sdxl_distill.shards.safetensors_layout import TORCH_DTYPES
from sdxl_distill.shards.set_folder import EMPTY_RECORD_NAME
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.storage.location import Location

_BATCH = 64


@dataclass(frozen=True)
class ManyRecords:
    """The sets of one job.

    Attributes:
        job: its checkpoints are there.
        num_records: of each set.
    """

    job: TinyJob
    num_records: int

    def build(self, on_shard: Callable[[], object] = lambda: None) -> Path:
        """Build all three sets and return the folder of the predictions.

        Args:
            on_shard: called when the reading of each predictions shard begins.
        """
        config = self.job.builder()
        output_dir = Path(config.cache.output_dir)
        with quiet():
            self._build_latents()
            with open_latents(config) as latents:
                text_path = self._build_text(latents, output_dir)
                path = output_dir / config.teacher.teacher_id
                with open_shard_set(text_path) as text:
                    identity = predictions_identity(
                        config,
                        self._source(),
                        latents,
                        text.manifest.identity,
                        Location(output_dir),
                    )
                    content = _predictions_content(identity, latents, text, on_shard)
                    shards = planned_after(latents, identity.id)
                    self._build(path, identity, shards, content)
        return path

    def _source(self) -> ModelFolder:
        return ModelFolder.resolve(self.job.builder().teacher.checkpoint_path)

    def _build_latents(self) -> None:
        config = self.job.builder()
        side, per_shard = self.job.side_px, self.job.records_per_shard
        ids = sorted(image_id(str(number).encode()) for number in range(self.num_records))
        cut = [ids[start : start + per_shard] for start in range(0, len(ids), per_shard)]
        shards = [
            PlannedShard(ShardName("latents", side, side, number), len(shard_ids))
            for number, shard_ids in enumerate(cut)
        ]

        def keys(shard: PlannedShard) -> list[str]:
            return [shard.name.key(record_id) for record_id in cut[shard.name.number]]

        path = Path(config.data.latent_cache.cache_dir)
        content = _Zeros(keys, sidecar=b'{"captions":[""]}')
        self._build(path, latents_identity(config, self._source()), shards, content)

    def _build_text(self, latents: ShardSet, output_dir: Path) -> Path:
        identity = text_identity(self._source(), latents, Location(output_dir))

        def keys(shard: PlannedShard) -> list[str]:
            name = shard.name
            return latents.index(ShardName("latents", name.width, name.height, name.number)).keys()

        path = output_dir / identity.id
        empty = encode_record(_zeros(identity), {FINGERPRINT: identity.fingerprint})
        with Directory(path, create=True) as directory:
            directory.publish_bytes(EMPTY_RECORD_NAME, empty)
        digest = hashlib.sha256(empty).hexdigest()
        self._build(path, identity, planned_after(latents, identity.id), _Zeros(keys), digest)
        return path

    def _build(
        self,
        path: Path,
        identity: SetIdentity,
        shards: list[PlannedShard],
        content: ShardContent[Any, Any],
        empty_sha256: str | None = None,
    ) -> None:
        def describe(_: Directory, found: SetIdentity, indices: Iterable[ShardIndex]) -> Manifest:
            return Manifest.build(found, 0, indices, empty_sha256=empty_sha256)

        build_set(Location(path), identity, shards, lambda: content, describe, World())


class _Zeros:
    """Content of zeros for given keys."""

    def __init__(
        self, keys: Callable[[PlannedShard], list[str]], sidecar: bytes | None = None
    ) -> None:
        self._keys = keys
        self._sidecar = sidecar

    def accepts(self, index: ShardIndex) -> bool:
        """Whether a tar found there will do: any."""
        del index
        return True

    def read(self, shard: PlannedShard) -> Iterator[list[str]]:
        """Yield the keys."""
        yield self._keys(shard)

    def compute(self, batch: list[str]) -> list[str]:
        """Do nothing."""
        return batch

    def encode(self, result: list[str], header: RecordHeader) -> Iterator[EncodedRecord]:
        """Yield the same zeros under each key."""
        zeros = {
            place.name: torch.zeros(place.shape, dtype=TORCH_DTYPES[place.dtype])
            for place in header.places
        }
        record = header.encode(zeros)
        for key in result:
            yield EncodedRecord(key, record, self._sidecar)


class _FreeUnet(nn.Module):
    """A UNet that predicts its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, noisy_latents: torch.Tensor, *_: torch.Tensor, **__: Any
    ) -> tuple[torch.Tensor]:
        return (noisy_latents,)


def _predictions_content(
    identity: SetIdentity, latents: ShardSet, text: ShardSet, on_shard: Callable[[], object]
) -> PredictionsContent:
    assert identity.noise_schedule is not None and identity.noise is not None

    class Watched(PredictionsContent):
        def read(self, shard: PlannedShard) -> Iterator[TeacherInput]:
            on_shard()
            return super().read(shard)

    teacher = Teacher(_FreeUnet(), identity.noise_schedule, torch.device("cpu"), torch.float16)
    return Watched(teacher, latents, text, identity.noise, _BATCH)


def _zeros(identity: SetIdentity) -> dict[str, torch.Tensor]:
    resolved = identity.schema.resolve(64, 64)
    return {
        name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
        for name, (dtype, shape) in resolved.items()
    }
