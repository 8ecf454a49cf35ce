"""A batch of joined records: what one rank's student sees in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.device import CopyStream


@dataclass(frozen=True)
class JoinedBatch:
    """The records of all sets for B keys of one bucket.

    Attributes:
        epoch: pass over the images that this step belongs to.
        step: position of the step in its epoch.
        bucket: the common resolution in pixels.
        keys: `{image_id}_{W}x{H}` of each record.
        draws: which (timestep, noise) pair of each image.
        latents: scaled VAE latents, float16 [B, C, H/8, W/8].
        noise: standard normal, float16 [B, C, H/8, W/8].
        timesteps: int64 [B].
        predictions: per teacher, in the order of the joined sets, [B, C, H/8, W/8] in its
            cache dtype.
        encoder_hidden_states: text embeddings, float16 [B, T, D].
        pooled_embeds: float16 [B, P].
        time_ids: micro-conditioning, int32 [B, 6].
    """

    epoch: int
    step: int
    bucket: Bucket
    keys: tuple[str, ...]
    draws: tuple[int, ...]
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    predictions: tuple[torch.Tensor, ...]
    encoder_hidden_states: torch.Tensor
    pooled_embeds: torch.Tensor
    time_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> JoinedBatch:
        """Copy to a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def uploaded(self, copies: CopyStream) -> JoinedBatch:
        """Copy to a device beside what it computes, which then waits for the copy."""
        with copies.copying() as copy:
            return self._map(copy)

    def micro_batches(self, max_records: int) -> Iterator[JoinedBatch]:
        """Cut into consecutive pieces of at most `max_records`, as views."""
        for start in range(0, len(self), max_records):
            rows = slice(start, start + max_records)
            piece = self._map(lambda tensor, rows=rows: tensor[rows])
            yield replace(piece, keys=self.keys[rows], draws=self.draws[rows])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> JoinedBatch:
        changed: dict[str, Any] = {"predictions": tuple(map(function, self.predictions))}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)
