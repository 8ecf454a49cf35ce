"""The tiny UNet: every part of SDXL's architecture, a thousandth of its width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import UNet2DConditionModel

from sdxl_distill.demo.tiny_text import HIDDEN_SIZE, PROJECTION_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

TIME_EMBED_DIM = 8
"""Channels in which each of the six time_ids enters (256 in SDXL)."""


def new_unet(block_widths: Sequence[int] = (32, 64, 64)) -> UNet2DConditionModel:
    """Build an SDXL-shaped UNet; its weights are for the caller to draw.

    Args:
        block_widths: channels of the three resolutions, multiples of 8.

    Returns:
        UNet of [B, 4, h, w] latents, [B, 77, 64] text and [B, 32] pooled embeddings.
    """
    # diffusers annotates these as tuples of one element.
    per_block: dict[str, Any] = {
        "block_out_channels": tuple(block_widths),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": tuple(max(1, width // 16) for width in block_widths),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(
        **per_block,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        cross_attention_dim=2 * HIDDEN_SIZE,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=PROJECTION_SIZE + 6 * TIME_EMBED_DIM,
    )
