"""An image folder of the demo, read and encoded as the UNet sees it, one bucket at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from sdxl_distill.core.bucket import Bucket, cover_crop
from sdxl_distill.core.micro_conditioning import time_ids
from sdxl_distill.demo.photos import BUCKETS
from sdxl_distill.models.unet import predict
from sdxl_distill.models.vae import encode_images

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import nn

    from sdxl_distill.models.text_encoder import TextEncoders


@dataclass(frozen=True)
class Photos:
    """Photos of one bucket.

    Attributes:
        bucket: their size.
        pixels: RGB, uint8 [N, H, W, 3].
        captions: one per photo.
    """

    bucket: Bucket
    pixels: torch.Tensor
    captions: tuple[str, ...]

    def mirrored(self) -> Photos:
        """Return the same photos, left and right swapped."""
        return Photos(self.bucket, self.pixels.flip(2), self.captions)

    def restyled(self, look: Callable[[torch.Tensor], torch.Tensor]) -> Photos:
        """Return the photos in a look, a function on float32 [N, 3, H, W] in 0 … 1."""
        changed = look(self.pixels.permute(0, 3, 1, 2) / 255) * 255
        pixels = changed.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return Photos(self.bucket, pixels, self.captions)


@dataclass(frozen=True)
class EncodedPhotos:
    """A UNet's input for N photos of one bucket; all float32.

    Attributes:
        bucket: their size.
        latents: scaled latents [N, 4, H/8, W/8].
        encoder_hidden_states: text embeddings [N, 77, hidden].
        pooled_embeds: pooled text embeddings [N, pooled].
        time_ids: sizes and crop [N, 6].
    """

    bucket: Bucket
    latents: torch.Tensor
    encoder_hidden_states: torch.Tensor
    pooled_embeds: torch.Tensor
    time_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: slice | torch.Tensor) -> EncodedPhotos:
        """Return the selected photos, with repetitions where `index` repeats."""
        return EncodedPhotos(
            self.bucket,
            self.latents[index],
            self.encoder_hidden_states[index],
            self.pooled_embeds[index],
            self.time_ids[index],
        )

    def predict(
        self, unet: nn.Module, noisy_latents: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the UNet's prediction [N, 4, H/8, W/8] with these photos' conditioning."""
        return predict(
            unet,
            noisy_latents,
            timesteps,
            self.encoder_hidden_states,
            self.pooled_embeds,
            self.time_ids,
        )


def read_photos(folder: Path) -> list[Photos]:
    """Read all crops of an image folder that `write_photos` wrote, in the order of `BUCKETS`."""
    found: dict[Bucket, list[tuple[np.ndarray, str]]] = {bucket: [] for bucket in BUCKETS}
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            found[Bucket(*image.size)].append(
                (np.asarray(image), path.with_suffix(".txt").read_text().strip())
            )
    return [
        Photos(
            bucket,
            torch.from_numpy(np.stack([pixels for pixels, _ in photos])),
            tuple(caption for _, caption in photos),
        )
        for bucket, photos in found.items()
        if photos
    ]


def encode_photos(photos: Photos, vae: AutoencoderKL, texts: TextEncoders) -> EncodedPhotos:
    """Encode pixels and captions, as the builders do; each distinct caption once."""
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(photos.captions))}
    embeddings = texts.encode(tuple(distinct))
    rows = [distinct[caption] for caption in photos.captions]
    width, height = photos.bucket
    ids = time_ids(width, height, cover_crop(width, height, photos.bucket), photos.bucket)
    return EncodedPhotos(
        photos.bucket,
        encode_images(vae, photos.pixels).to(torch.float32),
        embeddings.hidden[rows].to(torch.float32),
        embeddings.pooled[rows].to(torch.float32),
        torch.from_numpy(ids).to(torch.float32).expand(len(photos.captions), -1),
    )
