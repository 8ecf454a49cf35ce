"""The order of SDXL's six numbers, against diffusers' pipeline."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_distill.core.bucket import Bucket, CoverCrop
from sdxl_distill.core.micro_conditioning import time_ids


class _Geometry:
    """What `_get_add_time_ids` asks of its pipeline."""

    def __init__(self) -> None:
        self.unet = type("Unet", (), {})()
        self.unet.config = type("Config", (), {"addition_time_embed_dim": 256})()
        self.unet.add_embedding = type("Embedding", (), {})()
        self.unet.add_embedding.linear_1 = torch.nn.Linear(256 * 6 + 1280, 1)


def test_order_is_that_of_the_sdxl_pipeline() -> None:
    crop = CoverCrop(resized_width=1200, resized_height=1152, left=152, top=3)
    ours = time_ids(2000, 1500, crop, Bucket(896, 1152))
    oracle = StableDiffusionXLPipeline._get_add_time_ids(
        _Geometry(),
        original_size=(1500, 2000),
        crops_coords_top_left=(3, 152),
        target_size=(1152, 896),
        dtype=torch.float32,
        text_encoder_projection_dim=1280,
    )
    assert ours.dtype == np.int32
    assert ours.tolist() == oracle[0].tolist()
