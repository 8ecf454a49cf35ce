"""What records should hold, computed with diffusers, transformers and Pillow alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image, ImageOps


class PipelineOracle:
    """The components of a checkpoint as `StableDiffusionXLPipeline` loads them.

    Args:
        folder: of the checkpoint.
        dtype: of all its networks.
        scheduler: fields of the scheduler's configuration that differ from the checkpoint's.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **scheduler: Any) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        if dtype != torch.float32:  # a cast to what it is warns
            self.pipeline.to(dtype)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config, **scheduler)

    @torch.no_grad()
    def embeddings(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (hidden states [T, D], pooled [P]), float16."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False
        )
        return hidden[0].half(), pooled[0].half()

    @torch.no_grad()
    def latents(self, picture: Image.Image) -> torch.Tensor:
        """Return the scaled mean of the posterior, [4, H/8, W/8]."""
        pixels = self.pipeline.image_processor.preprocess(picture).to(self.pipeline.vae.dtype)
        mode = self.pipeline.vae.encode(pixels).latent_dist.mode()
        return (mode * self.pipeline.vae.config.scaling_factor)[0]

    def time_ids(
        self, size: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> list[int]:
        """Return the pipeline's own time ids of (height, width), (top, left), (height, width)."""
        projection = self.pipeline.text_encoder_2.config.projection_dim
        ids = self.pipeline._get_add_time_ids(
            size, crop, target, torch.float32, text_encoder_projection_dim=projection
        )
        return ids[0].int().tolist()

    @torch.no_grad()
    def prediction(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: int,
        embeddings: tuple[torch.Tensor, torch.Tensor],
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the UNet predicts for one record, float32 [4, H/8, W/8]."""
        dtype, step = self.pipeline.unet.dtype, torch.tensor([timestep])
        noisy = self.scheduler.add_noise(latents[None].float(), noise[None].float(), step)
        hidden, pooled = embeddings
        conditioning = {
            "text_embeds": pooled[None].to(dtype),
            "time_ids": time_ids[None].float(),
        }
        return (
            self.pipeline.unet(
                noisy.to(dtype),
                step,
                encoder_hidden_states=hidden[None].to(dtype),
                added_cond_kwargs=conditioning,
            )
            .sample[0]
            .float()
        )


def upright_picture(path: Path) -> Image.Image:
    """Open a picture as a viewer shows it, on white paper, with 8 bits."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "RGBA":
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        return paper
    return image.convert("RGB")


def cropped_picture(
    picture: Image.Image, bucket: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int]]:
    """Resize a picture to cover a bucket and cut its middle; also (left, top) of the cut."""
    scale = max(target / side for target, side in zip(bucket, picture.size, strict=True))
    size = tuple(int(side * scale + 0.5) for side in picture.size)
    left, top = ((side - target) // 2 for side, target in zip(size, bucket, strict=True))
    covering = picture.resize(size, Image.Resampling.LANCZOS)
    return covering.crop((left, top, left + bucket[0], top + bucket[1])), (left, top)
