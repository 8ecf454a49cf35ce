"""The four networks of SDXL: their classes, file names, and what their configurations leave out.

diffusers and transformers are imported when a network is built, not before: that takes seconds,
which a builder that finds everything done need not spend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import CLIPTextConfig

Config = dict[str, Any]
"""A parsed `config.json`."""

PIPELINE_PARTS: Final[Config] = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""What `model_index.json` says of SDXL's parts, [library, class]; it also names a scheduler."""


@dataclass(frozen=True, eq=False)
class ComponentKind:
    """What one of SDXL's networks must be.

    Attributes:
        name: the name of its folder and of its entry in `model_index.json`.
        class_name: the only class that is ever built for it.
        build: the function that makes its module from a parsed `config.json`.
        weights_stem: its library's name for the weights file, without suffix.
        defaults: the configuration fields that decide sizes or output, with the values that
            hold when a file leaves them out.
        prefix: a word that some library versions put before a tensor's name, and others do not.
        unprefixed: the tensors that no version puts it before.
        legacy_names: tensors of older files that the network no longer has: constants.
    """

    name: str
    class_name: str
    build: Callable[[Config], nn.Module]
    weights_stem: str
    defaults: Mapping[str, Any]
    prefix: str = ""
    unprefixed: frozenset[str] = frozenset()
    legacy_names: frozenset[str] = frozenset()

    def plain_name(self, name: str) -> str:
        """Return a tensor's name without the prefix, as fingerprints hold it."""
        return name.removeprefix(self.prefix)

    def hub_name(self, plain_name: str) -> str:
        """Return a tensor's name in the files on the hub, which every library version reads."""
        return plain_name if plain_name in self.unprefixed else self.prefix + plain_name


def _build_unet(config: Config) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return cast("nn.Module", UNet2DConditionModel.from_config(config))


def _build_vae(config: Config) -> nn.Module:
    from diffusers import AutoencoderKL

    return cast("nn.Module", AutoencoderKL.from_config(config))


def _build_text_encoder(config: Config) -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(config))


def _build_text_encoder_2(config: Config) -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(config))


def _clip_config(config: Config) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig.from_dict(config)


# The tables are part of every fingerprint: a library that changes a default must not change them.
_CLIP_DEFAULTS: Final[Mapping[str, Any]] = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 8,
    "eos_token_id": 49407,
    "hidden_size": 512,
    "projection_dim": 512,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}

UNET: Final = ComponentKind(
    name="unet",
    class_name="UNet2DConditionModel",
    build=_build_unet,
    weights_stem="diffusion_pytorch_model",
    defaults={
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "only_cross_attention": False,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "upcast_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    },
)
VAE: Final = ComponentKind(
    name="vae",
    class_name="AutoencoderKL",
    build=_build_vae,
    weights_stem="diffusion_pytorch_model",
    defaults={
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
)
TEXT_ENCODER: Final = ComponentKind(
    name="text_encoder",
    class_name="CLIPTextModel",
    build=_build_text_encoder,
    weights_stem="model",
    defaults=_CLIP_DEFAULTS,
    prefix="text_model.",
    unprefixed=frozenset({"text_projection.weight"}),
    legacy_names=frozenset({"embeddings.position_ids"}),
)
TEXT_ENCODER_2: Final = replace(
    TEXT_ENCODER,
    name="text_encoder_2",
    class_name="CLIPTextModelWithProjection",
    build=_build_text_encoder_2,
)
