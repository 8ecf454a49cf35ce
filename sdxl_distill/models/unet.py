"""The UNet: loading it, the sizes that records take from it, and one prediction.

Teacher and student go through the same `predict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import nn

from sdxl_distill.errors import IncompatibleError
from sdxl_distill.models.component import channels_last_on_gpu
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.vae import PIXELS_PER_LATENT

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

NUM_TIME_IDS = 6
"""Original height and width, crop top and left, target height and width."""

_COMPILED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
# With and without gradients; single records and sides of equal length are shapes apart for dynamo,
# and so is the first call, before a size is seen to vary.
_MAX_GRAPHS_OF_A_BLOCK = 16


class UnetGeometry(NamedTuple):
    """What a UNet takes.

    Attributes:
        channels: channels of latents and prediction.
        hidden_size: width of a text token: both encoders' widths together.
        pooled_size: width of the pooled text embedding.
    """

    channels: int
    hidden_size: int
    pooled_size: int


class UnetInput(NamedTuple):
    """What `predict` takes besides the UNet: B records of one bucket, in the stored types."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    pooled_embeds: torch.Tensor
    time_ids: torch.Tensor

    @classmethod
    def zeros(
        cls, geometry: UnetGeometry, num_records: int, size_px: tuple[int, int], num_tokens: int
    ) -> UnetInput:
        """Make an input of zeros for B records of (width, height) pixels."""
        width, height = (side // PIXELS_PER_LATENT for side in size_px)
        half = torch.float16
        return cls(
            torch.zeros(num_records, geometry.channels, height, width, dtype=half),
            torch.zeros(num_records, dtype=torch.int64),
            torch.zeros(num_records, num_tokens, geometry.hidden_size, dtype=half),
            torch.zeros(num_records, geometry.pooled_size, dtype=half),
            torch.zeros(num_records, NUM_TIME_IDS, dtype=torch.int32),
        )


def unet_geometry(checkpoint: ModelFolder) -> UnetGeometry:
    """Read a UNet's sizes from its configuration, without its weights.

    Raises:
        ConfigError, CorruptError: when the configuration is missing or unreadable.
        IncompatibleError: when it is not SDXL's kind of UNet: SD 1.5, inpainting, refiner.
    """
    unet = checkpoint.unet
    if unet.field("addition_embed_type") != "text_time":
        raise IncompatibleError(
            f"a UNet with addition_embed_type {unet.field('addition_embed_type')!r}",
            expected="SDXL's 'text_time'",
            where=str(unet.folder),
            action="use an SDXL checkpoint; SD 1.x and 2.x have another UNet",
        )
    if unet.field("time_cond_proj_dim") is not None:
        raise IncompatibleError(
            f"a UNet that takes the guidance scale (time_cond_proj_dim "
            f"{unet.field('time_cond_proj_dim')!r})",
            expected="null: a UNet that is sampled with ordinary guidance",
            where=str(unet.folder),
            action="use the checkpoint that this LCM was distilled from",
        )
    channels, out_channels = unet.size("in_channels"), unet.size("out_channels")
    time_size = unet.size("addition_time_embed_dim")
    pooled_size = unet.size("projection_class_embeddings_input_dim") - NUM_TIME_IDS * time_size
    if channels != out_channels or pooled_size < 1:
        raise IncompatibleError(
            f"{channels} channels in, {out_channels} out, {pooled_size} for pooled embeddings",
            expected=f"a base UNet: equal channels, {NUM_TIME_IDS} time ids",
            where=str(unet.folder),
            action="use a base checkpoint, not an inpainting or a refiner one",
        )
    return UnetGeometry(channels, unet.size("cross_attention_dim"), pooled_size)


def load_unet(
    checkpoint: ModelFolder, dtype: torch.dtype, device: torch.device | str
) -> UNet2DConditionModel:
    """Load a UNet, frozen and in evaluation mode.

    Raises:
        ConfigError, CorruptError, IncompatibleError: as `unet_geometry` and `Component.load`.
    """
    unet_geometry(checkpoint)
    unet = channels_last_on_gpu(checkpoint.unet.load(dtype, device))
    return cast("UNet2DConditionModel", unet)


def compile_unet(unet: nn.Module, way: Literal["regional", "full"], num_shapes: int) -> None:
    """Compile a UNet in place; names of its parameters stay.

    Args:
        unet: a UNet from `load_unet`.
        way: "regional" compiles transformer and ResNet blocks for inputs of any shape: blocks alike
            in their weights' shapes share a graph, and a new bucket seldom needs another. "full"
            compiles the whole network at its first call with each shape for exactly that one:
            fixed sizes and wider fusion make faster kernels, after minutes for every shape.
        num_shapes: the number of shapes that it will be called with, in each of its modes (with
            and without gradients).
    """
    if way == "full":
        _allow_graphs(num_shapes)
        unet.compile(dynamic=False)
        return
    # As diffusers' compile_repeated_blocks does, which leaves the ResNets out.
    blocks = [block for block in unet.modules() if type(block).__name__ in _COMPILED_BLOCKS]
    _allow_graphs(_MAX_GRAPHS_OF_A_BLOCK * len({_weight_shapes(block) for block in blocks}))
    for block in blocks:
        block.compile(dynamic=True)


def _allow_graphs(num_graphs: int) -> None:
    """Raise the limit beyond which the compiler would silently stop compiling."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, num_graphs)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 * num_graphs)


def _weight_shapes(block: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, weight.shape) for name, weight in block.named_parameters())


def predict(
    unet: nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_embeds: torch.Tensor,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """Return the UNet's prediction, float32 [B, C, h, w].

    Differentiable; callers that need no gradients say so with `torch.no_grad`. Timesteps and
    time_ids are never rounded to the compute type: diffusers projects them to sinusoids in
    float32, and bfloat16 would turn an original height of 1023 into 1024.

    Args:
        unet: an SDXL UNet, possibly compiled or wrapped for distributed training.
        noisy_latents: the latents to denoise [B, C, h, w], float32.
        timesteps: one per record [B], int64.
        encoder_hidden_states: text embeddings [B, tokens, hidden_size], any float type.
        pooled_embeds: pooled text embeddings [B, pooled_size], any float type.
        time_ids: sizes and crop [B, 6], whole numbers of any type.
    """
    # All in the UNet's dtype, but for the numbers that become sinusoids.
    dtype = next(unet.parameters()).dtype
    (prediction,) = unet(
        noisy_latents.to(dtype),
        timesteps.to(torch.int64),
        encoder_hidden_states=encoder_hidden_states.to(dtype),
        added_cond_kwargs={
            "text_embeds": pooled_embeds.to(dtype),
            "time_ids": time_ids.to(torch.float32),
        },
        return_dict=False,
    )
    return prediction.to(torch.float32)
