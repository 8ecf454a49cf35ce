from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_distill.errors import IncompatibleError, NumericalError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import (
    TextEncoders,
    TextGeometry,
    require_fit,
    text_geometry,
)
from sdxl_distill.models.unet import UnetGeometry, unet_geometry

pytestmark = pytest.mark.processors

CAPTIONS = [
    "a photo of a cat in the grass",
    "",
    "A Photo, with  spaces and CAPITALS!",
    "ein Café – 猫 🐈 <|endoftext|> after",
    "the garden " * 60,
]


@pytest.fixture(scope="module")
def pipeline(tiny_family):
    return StableDiffusionXLPipeline.from_pretrained(tiny_family.base)


@pytest.fixture(scope="module")
def checkpoint(tiny_family):
    return ModelFolder.resolve(str(tiny_family.base))


@pytest.fixture(scope="module")
def encoders(checkpoint):
    return TextEncoders.load(checkpoint, "cpu")


def change_config(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@torch.no_grad()
@pytest.mark.parametrize("caption", CAPTIONS)
def test_embeddings_equal_those_of_the_pipeline(pipeline, encoders, caption):
    hidden, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    ours = encoders.encode([caption])
    assert torch.equal(ours.hidden, hidden.half())
    assert torch.equal(ours.pooled, pooled.half())


def test_shapes_are_those_of_the_geometry(checkpoint, encoders):
    num_tokens, hidden_size, pooled_size = text_geometry(checkpoint)
    embeddings = encoders.encode(CAPTIONS[:2])
    assert embeddings.hidden.shape == (2, num_tokens, hidden_size)
    assert embeddings.pooled.shape == (2, pooled_size)
    assert embeddings.hidden.dtype == embeddings.pooled.dtype == torch.float16


def test_embeddings_do_not_depend_on_the_other_captions(encoders):
    together = encoders.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoders.encode([caption])
        assert torch.equal(together.hidden[row], alone.hidden[0])
        assert torch.equal(together.pooled[row], alone.pooled[0])


def test_each_tokenizer_pads_with_its_own_token(encoders):
    first, second = encoders.tokenizers
    assert first.pad_token_id != second.pad_token_id
    embeddings = encoders.encode([""])
    width = encoders.encoders[0].config.hidden_size
    assert not torch.equal(embeddings.hidden[..., :width], embeddings.hidden[..., width:])


def test_a_caption_that_just_fits_is_not_truncated(encoders):
    fits = " ".join("7" * 75)
    assert encoders.num_tokens(fits) == encoders.token_limit == 77
    assert not encoders.is_truncated(fits)
    assert encoders.is_truncated(fits + " 7")


def test_what_is_beyond_the_limit_changes_nothing(encoders):
    fits = " ".join("7" * 75)
    ours, cut = encoders.encode([fits]), encoders.encode([fits + " 8"])
    assert torch.equal(ours.hidden, cut.hidden)


def test_the_empty_caption_has_two_tokens(encoders):
    assert encoders.num_tokens("") == 2


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_embeddings_beyond_float16_name_the_caption(checkpoint, value):
    encoders = TextEncoders.load(checkpoint, "cpu")
    encoders.encoders[1].text_projection.register_forward_hook(
        lambda _module, _args, output: output * value
    )
    with pytest.raises(NumericalError, match="'a cat'"):
        encoders.encode(["a cat"])


def test_encoders_computed_in_bfloat16_are_close(checkpoint, encoders):
    exact = encoders.encode(CAPTIONS).hidden.float()
    rounded = TextEncoders.load(checkpoint, "cpu", torch.bfloat16).encode(CAPTIONS).hidden.float()
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 50}, "of 50 tokens"),
        ("text_encoder/config.json", {"max_position_embeddings": 60}, "encoder of 60 tokens"),
        ("text_encoder_2/config.json", {"vocab_size": 100}, "and 100 ids"),
        ("text_encoder_2/config.json", {"projection_dim": None}, "projection_dim is None"),
    ],
)
def test_tokenizers_and_encoders_that_do_not_fit_are_incompatible(folder, name, fields, message):
    change_config(folder, name, **fields)
    with pytest.raises(IncompatibleError, match=message):
        TextEncoders.load(ModelFolder.resolve(str(folder)), "cpu")


def test_text_encoders_of_the_family_fit_its_unet(checkpoint):
    require_fit(text_geometry(checkpoint), unet_geometry(checkpoint), "tiny")


@pytest.mark.parametrize("unet", [UnetGeometry(4, 2048, 32), UnetGeometry(4, 64, 1280)])
def test_text_encoders_of_another_family_do_not_fit(unet):
    with pytest.raises(IncompatibleError, match="text embeddings of size 64, pooled 32"):
        require_fit(TextGeometry(77, 64, 32), unet, "tiny")
