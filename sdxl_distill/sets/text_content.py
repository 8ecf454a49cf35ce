"""What a text set holds: the embeddings of each image's caption, and of the empty caption."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.builder.set_builder import EncodedRecord
from sdxl_distill.models.text_encoder import TextEmbeddings, TextEncoders
from sdxl_distill.sets.derived_shards import holds_same_keys, latents_name
from sdxl_distill.shards.index import ShardIndex
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.shard_set import ShardSet
from sdxl_distill.shards.sidecar import parse_captions

_CAPTIONS_AT_ONCE: Final = 16
_CACHED_CAPTIONS: Final = 1024  # 310 KiB each with SDXL's encoders


class CaptionBatch(NamedTuple):
    """Keys and captions of some records of one shard."""

    keys: list[str]
    captions: list[str]


class EmbeddingBatch(NamedTuple):
    """The same captions encoded."""

    keys: list[str]
    embeddings: list[TextEmbeddings]


class CaptionEncoder:
    """Encodes captions, and counts those that are too long.

    It is not a part of `TextContent`, whose cache would then refer to itself: the encoders must
    be freed with the last reference, before the UNet needs their memory.

    Args:
        encoders: the loaded text encoders.
    """

    def __init__(self, encoders: TextEncoders) -> None:
        self._encoders = encoders
        self.num_truncated = 0
        """The number of captions whose ends the encoders did not see."""

    def __call__(self, caption: str) -> TextEmbeddings:
        """Return the embeddings of one caption, [1, …]."""
        self.num_truncated += self._encoders.is_truncated(caption)
        return self._encoders.encode([caption])


class TextContent:
    """Content of a text set, for `set_builder.build_shards`.

    A caption that many images share is encoded once by each worker that meets it.

    Args:
        latents: the set whose sidecars hold the captions.
        encoder: the function that encodes captions.
    """

    def __init__(self, latents: ShardSet, encoder: CaptionEncoder) -> None:
        self._latents = latents
        self._embed = lru_cache(_CACHED_CAPTIONS)(encoder)

    def accepts(self, index: ShardIndex) -> bool:
        """Whether a tar holds exactly the keys of its latents shard."""
        return holds_same_keys(index, self._latents)

    def read(self, shard: PlannedShard) -> Iterator[CaptionBatch]:
        """Yield the captions of a shard, the first of each image."""
        reader = self._latents.reader(latents_name(self._latents, shard.name))
        keys = reader.index.keys()
        for start in range(0, len(keys), _CAPTIONS_AT_ONCE):
            records = range(start, min(start + _CAPTIONS_AT_ONCE, len(keys)))
            captions = [
                parse_captions(
                    reader.read_sidecar(record),
                    "rebuild the latents set",
                    f"latents set, key {keys[record]}",
                )[0]
                for record in records
            ]
            yield CaptionBatch([keys[record] for record in records], captions)

    def compute(self, batch: CaptionBatch) -> EmbeddingBatch:
        """Encode the captions."""
        return EmbeddingBatch(batch.keys, [self._embed(caption) for caption in batch.captions])

    def encode(self, result: EmbeddingBatch, header: RecordHeader) -> Iterator[EncodedRecord]:
        """Yield one record for each image."""
        for key, embeddings in zip(result.keys, result.embeddings, strict=True):
            yield EncodedRecord(key, header.encode(text_tensors(embeddings)))


def text_tensors(embeddings: TextEmbeddings) -> dict[str, torch.Tensor]:
    """Return the tensors of the record of one caption, whose embeddings are [1, …]."""
    return {
        "encoder_hidden_states": embeddings.hidden[0],
        "pooled_embeds": embeddings.pooled[0],
    }
