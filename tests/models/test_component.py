from __future__ import annotations

import inspect
import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.models.component import Component
from sdxl_distill.models.component_kind import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE

CLASSES = {
    UNET: UNet2DConditionModel,
    VAE: AutoencoderKL,
    TEXT_ENCODER: CLIPTextModel,
    TEXT_ENCODER_2: CLIPTextModelWithProjection,
}
KINDS = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.name)


def weights_file(folder, kind):
    return folder / kind.name / f"{kind.weights_stem}.safetensors"


def rewrite_weights(folder, kind, change):
    """Replace the weights of a component by `change(weights)`."""
    weights = load_file(weights_file(folder, kind))
    save_file(change(weights), weights_file(folder, kind), metadata={"format": "pt"})
    return Component(kind, folder / kind.name)


def rewrite_config(folder, kind, **fields):
    path = folder / kind.name / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(config))
    return Component(kind, folder / kind.name)


NO_CONTENT = {"sample_size", "force_upcast"}


@pytest.mark.parametrize("kind", [UNET, VAE], ids=lambda kind: kind.name)
def test_the_defaults_are_those_of_diffusers(kind):
    """Every field that can change an output; a new one must be looked at by somebody."""
    parameters = inspect.signature(CLASSES[kind].__init__).parameters.values()
    theirs = {each.name: each.default for each in parameters if each.name != "self"}
    assert kind.class_name == CLASSES[kind].__name__
    assert theirs.keys() - kind.defaults.keys() <= NO_CONTENT
    for name, default in kind.defaults.items():
        expected = list(theirs[name]) if isinstance(theirs[name], tuple) else theirs[name]
        assert (type(default), default) == (type(expected), expected), name


@pytest.mark.parametrize("kind", [TEXT_ENCODER, TEXT_ENCODER_2], ids=lambda kind: kind.name)
def test_the_defaults_are_those_of_transformers(kind):
    config = CLIPTextConfig()
    assert kind.class_name == CLASSES[kind].__name__
    assert kind.defaults == {name: getattr(config, name) for name in kind.defaults}


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_those_that_the_library_loads(tiny_family, kind, dtype):
    ours = Component(kind, tiny_family.base / kind.name).load(dtype, "cpu")
    theirs = CLASSES[kind].from_pretrained(tiny_family.base / kind.name, torch_dtype=dtype)
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert ours.state_dict()[name].dtype == dtype
        assert torch.equal(ours.state_dict()[name], weight), name


@KINDS
def test_a_loaded_network_is_complete_frozen_and_in_evaluation_mode(tiny_family, kind):
    network = Component(kind, tiny_family.base / kind.name).load(torch.float32, "cpu")
    tensors = [*network.parameters(), *network.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert not any(module.training for module in network.modules())


def test_loading_draws_nothing_from_the_global_generator(tiny_family):
    before = torch.get_rng_state()
    Component(UNET, tiny_family.base / "unet").load(torch.float32, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_tensors_are_incompatible_with_their_count_and_first_names(folder):
    component = rewrite_weights(
        folder, UNET, lambda weights: {k: v for k, v in weights.items() if "down_blocks" not in k}
    )
    with pytest.raises(IncompatibleError, match=r"\d\d+ tensors missing: down_blocks\.0\..*more"):
        component.load(torch.float32, "cpu")


def test_extra_tensors_are_incompatible_with_their_names(folder):
    component = rewrite_weights(
        folder, UNET, lambda weights: weights | {"lora.up": torch.ones(2), "v_pred": torch.ones(1)}
    )
    with pytest.raises(IncompatibleError, match=r"2 tensors too many: lora\.up, v_pred"):
        component.require_complete()


def test_a_tensor_of_another_shape_is_incompatible_with_both_shapes(folder):
    component = rewrite_weights(
        folder, UNET, lambda weights: weights | {"conv_in.bias": torch.ones(5)}
    )
    with pytest.raises(IncompatibleError, match=r"conv_in\.bias \[5\] instead of \[16\]"):
        component.load(torch.float32, "cpu")


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_corrupt_with_their_count(folder, kind, value):
    def spoil(weights):
        for name in sorted(weights)[:2]:
            weights[name].view(-1)[-1] = value
        return weights

    component = rewrite_weights(folder, kind, spoil)
    with pytest.raises(CorruptError, match="2 tensors hold NaN or infinity"):
        component.load(torch.float32, "cpu")
    with pytest.raises(CorruptError, match="2 tensors hold NaN or infinity"):
        _ = component.fingerprint


@KINDS
def test_the_fingerprint_does_not_depend_on_the_layout_of_files(tiny_family, tmp_path, kind):
    source = tiny_family.base / kind.name
    network = CLASSES[kind].from_pretrained(source)
    network.save_pretrained(tmp_path / kind.name, max_shard_size="100KB")
    assert len(list((tmp_path / kind.name).glob("*.safetensors"))) > 1
    resaved = Component(kind, tmp_path / kind.name)
    assert resaved.fingerprint == Component(kind, source).fingerprint


@pytest.mark.parametrize("kind", [TEXT_ENCODER, TEXT_ENCODER_2], ids=lambda kind: kind.name)
def test_names_of_older_and_newer_libraries_are_the_same_text_encoder(folder, kind):
    def to_newer(weights):
        return {name.removeprefix("text_model."): weight for name, weight in weights.items()}

    def to_older(weights):
        older = {
            name if name.startswith("text_") else f"text_model.{name}": weight
            for name, weight in weights.items()
        }
        return older | {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    original = Component(kind, folder / kind.name).fingerprint
    for rename in (to_newer, to_older):
        component = rewrite_weights(folder, kind, rename)
        assert component.fingerprint == original
        component.load(torch.float32, "cpu")


def test_one_changed_bit_of_one_weight_changes_the_fingerprint(folder):
    original = Component(UNET, folder / "unet").fingerprint
    content = bytearray(weights_file(folder, UNET).read_bytes())
    content[-1] ^= 1
    weights_file(folder, UNET).write_bytes(content)
    assert Component(UNET, folder / "unet").fingerprint != original


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (UNET, {"attention_head_dim": [2, 4, 4]}),
        (UNET, {"norm_eps": 1e-6}),
        (VAE, {"scaling_factor": 0.18215}),
        (TEXT_ENCODER, {"hidden_act": "gelu"}),
    ],
    ids=lambda value: value.name if not isinstance(value, dict) else next(iter(value)),
)
def test_fields_that_change_the_output_change_the_fingerprint(folder, kind, fields):
    original = Component(kind, folder / kind.name).fingerprint
    assert rewrite_config(folder, kind, **fields).fingerprint != original


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (UNET, {"_diffusers_version": "0.19.0", "_name_or_path": "/x", "sample_size": 64}),
        (VAE, {"force_upcast": False, "sample_size": 512}),
        (TEXT_ENCODER, {"torch_dtype": "float16", "transformers_version": "4.32.0"}),
    ],
    ids=lambda value: value.name if not isinstance(value, dict) else "",
)
def test_fields_that_change_nothing_leave_the_fingerprint(folder, kind, fields):
    original = Component(kind, folder / kind.name).fingerprint
    assert rewrite_config(folder, kind, **fields).fingerprint == original


def test_a_field_left_out_is_the_same_as_its_default(folder):
    original = Component(UNET, folder / "unet").fingerprint
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["act_fn"], config["flip_sin_to_cos"]
    path.write_text(json.dumps(config))
    assert Component(UNET, folder / "unet").fingerprint == original


@KINDS
def test_a_configuration_of_another_class_is_incompatible(folder, kind):
    component = rewrite_config(folder, kind, _class_name="VQModel", architectures=["T5Model"])
    with pytest.raises(IncompatibleError, match="describes the class VQModel"):
        _ = component.config


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (UNET, {"down_block_types": ["NoSuchBlock2D"] * 3}),
        (UNET, {"block_out_channels": "wide"}),
        (VAE, {"norm_num_groups": 5}),
        (TEXT_ENCODER, {"hidden_size": "wide"}),
        (TEXT_ENCODER_2, {"hidden_act": "no_such_activation"}),
    ],
)
def test_a_configuration_that_makes_no_network_is_incompatible(folder, kind, fields):
    component = rewrite_config(folder, kind, **fields)
    with pytest.raises(IncompatibleError, match="does not describe"):
        component.require_complete()


def test_a_huge_configuration_is_refused_before_memory_is_taken(folder):
    component = rewrite_config(folder, TEXT_ENCODER, vocab_size=2**50)
    with pytest.raises(IncompatibleError, match="token_embedding"):
        component.load(torch.float32, "cpu")


def test_a_missing_configuration_is_a_config_error(folder):
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no config\.json"):
        _ = Component(UNET, folder / "unet").config
