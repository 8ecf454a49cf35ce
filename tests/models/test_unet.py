from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from sdxl_distill.demo.family import Family
from sdxl_distill.errors import IncompatibleError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import load_unet, predict, unet_geometry

pytestmark = pytest.mark.processors


class Inputs(NamedTuple):
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    pooled_embeds: torch.Tensor
    time_ids: torch.Tensor


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        torch.randn(3, 4, 16, 8, generator=generator),
        torch.tensor([0, 501, 999]),
        torch.randn(3, 77, 64, generator=generator).half(),
        torch.randn(3, 32, generator=generator).half(),
        torch.tensor([[1023, 771, 0, 5, 128, 64]] * 3, dtype=torch.int32),
    )


@pytest.fixture(scope="module")
def checkpoint(tiny_family):
    return ModelFolder.resolve(str(tiny_family.base))


def call_diffusers(unet, inputs, dtype):
    """The prediction of diffusers' own UNet, with whole numbers kept in float32 and int64."""
    return unet(
        inputs.noisy_latents.to(dtype),
        inputs.timesteps,
        encoder_hidden_states=inputs.encoder_hidden_states.to(dtype),
        added_cond_kwargs={
            "text_embeds": inputs.pooled_embeds.to(dtype),
            "time_ids": inputs.time_ids.float(),
        },
    ).sample.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_predictions_are_those_of_diffusers(tiny_family, checkpoint, inputs, dtype):
    theirs = UNet2DConditionModel.from_pretrained(tiny_family.base / "unet", torch_dtype=dtype)
    ours = predict(load_unet(checkpoint, dtype, "cpu"), *inputs)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, call_diffusers(theirs, inputs, dtype))


@torch.no_grad()
def test_conditioning_is_that_of_the_pipeline(tiny_family, checkpoint):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_family.base)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seen = {}

    def remember(_module, args, kwargs, output):
        seen.update(kwargs, args=args, output=output)

    pipeline.unet.register_forward_hook(remember, with_kwargs=True)
    pipeline(
        "a photo of a cat",
        height=64,
        width=128,
        num_inference_steps=1,
        guidance_scale=1.0,
        original_size=(700, 1023),
        crops_coords_top_left=(3, 40),
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    )
    ours = predict(
        load_unet(checkpoint, torch.float32, "cpu"),
        seen["args"][0],
        seen["args"][1][None],
        seen["encoder_hidden_states"],
        seen["added_cond_kwargs"]["text_embeds"],
        torch.tensor([[700, 1023, 3, 40, 64, 128]], dtype=torch.int32),
    )
    assert torch.equal(ours, seen["output"][0])


@torch.no_grad()
def test_whole_numbers_reach_the_projections_exactly_in_bfloat16(checkpoint, inputs):
    unet = load_unet(checkpoint, torch.bfloat16, "cpu")
    seen = []
    for projection in (unet.time_proj, unet.add_time_proj):
        projection.register_forward_hook(
            lambda _module, args, output: seen.append((args[0], output.dtype))
        )
    predict(unet, *inputs)
    (timesteps, time_type), (time_ids, ids_type) = seen
    assert torch.equal(timesteps, inputs.timesteps)
    assert torch.equal(time_ids, inputs.time_ids.flatten().float())
    assert (time_type, ids_type) == (torch.float32, torch.float32)


@torch.no_grad()
def test_neighbouring_sizes_stay_distinct_in_bfloat16(checkpoint, inputs):
    unet = load_unet(checkpoint, torch.bfloat16, "cpu")
    rounded = inputs.time_ids.bfloat16().to(torch.int32)
    assert not torch.equal(rounded, inputs.time_ids)
    first = predict(unet, *inputs)
    second = predict(unet, *inputs._replace(time_ids=rounded))
    assert not torch.equal(first, second)


def test_an_lcm_is_refused(make_family: Callable[..., Family]) -> None:
    path = make_family().base / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_cond_proj_dim": 256}))
    with pytest.raises(IncompatibleError, match="time_cond_proj_dim 256"):
        unet_geometry(ModelFolder.resolve(str(path.parents[1])))


def test_gradients_reach_every_weight_of_a_student(checkpoint, inputs):
    unet = load_unet(checkpoint, torch.float32, "cpu").requires_grad_(True)
    predict(unet, *inputs).square().mean().backward()
    without = [name for name, weight in unet.named_parameters() if weight.grad is None]
    assert without == []


def test_geometry_is_that_of_the_loaded_weights(checkpoint):
    weights = load_unet(checkpoint, torch.float32, "cpu").state_dict()
    channels, hidden_size, pooled_size = unet_geometry(checkpoint)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    time_size = 6 * checkpoint.unet.config["addition_time_embed_dim"]
    assert weights["conv_in.weight"].shape[1] == channels
    assert weights[attention].shape[1] == hidden_size
    assert weights["add_embedding.linear_1.weight"].shape[1] == pooled_size + time_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"addition_embed_type": None}, "addition_embed_type None"),
        ({"in_channels": 9}, "9 channels in, 4 out"),
        ({"projection_class_embeddings_input_dim": 40}, "-8 for pooled"),
        ({"cross_attention_dim": [64, 64, 64]}, "cross_attention_dim"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim is None"),
    ],
)
def test_another_kind_of_unet_is_incompatible(folder, fields, message):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(IncompatibleError, match=message):
        load_unet(ModelFolder.resolve(str(folder)), torch.float32, "cpu")
