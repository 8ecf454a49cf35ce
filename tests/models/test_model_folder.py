from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
from diffusers import DDPMScheduler
from transformers import CLIPTokenizerFast

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.models.model_folder import ModelFolder


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache; returns a function that puts a folder there under a hub id."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(folder, hub_id):
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        commit = "a" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)

    return add


def test_a_local_folder_is_found_by_its_path(tiny_family):
    checkpoint = ModelFolder.resolve(str(tiny_family.base))
    assert checkpoint.folder == tiny_family.base


def test_a_hub_id_is_found_in_the_hubs_cache(tiny_family, hub_cache):
    hub_cache(tiny_family.base, "someone/sdxl-tiny")
    checkpoint = ModelFolder.resolve("someone/sdxl-tiny")
    assert (
        checkpoint.unet_fingerprint()
        == ModelFolder.resolve(str(tiny_family.base)).unet_fingerprint()
    )


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_that_is_not_in_the_cache_says_how_to_get_it():
    with pytest.raises(ConfigError, match=r"cache(.|\n)*hf download someone/sdxl-tiny"):
        ModelFolder.resolve("someone/sdxl-tiny")


def test_a_part_missing_in_the_hubs_cache_says_how_to_get_it(folder, hub_cache):
    shutil.rmtree(folder / "vae")
    hub_cache(folder, "someone/sdxl-tiny")
    checkpoint = ModelFolder.resolve("someone/sdxl-tiny")
    with pytest.raises(ConfigError, match=r"no folder vae(.|\n)*hf download someone/sdxl-tiny"):
        checkpoint.vae_fingerprint()


@pytest.mark.parametrize(
    "reference", ["./no/such", "/no/such/folder", "no", "~/no such", "", "no..such/id"]
)
def test_a_path_where_nothing_is_is_a_config_error(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such folder|there is no model_index"):
        ModelFolder.resolve(reference)


def test_a_single_file_says_how_to_convert_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="from_single_file"):
        ModelFolder.resolve(str(tmp_path / "model.safetensors"))


def test_a_folder_of_something_else_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no model_index\.json"):
        ModelFolder.resolve(str(tmp_path))


def test_an_sd15_folder_is_incompatible(folder):
    change_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(IncompatibleError, match=r"a StableDiffusionPipeline; expected a Stable"):
        ModelFolder.resolve(str(folder))


def test_a_component_of_another_class_is_incompatible(folder):
    change_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(IncompatibleError, match="vae is a AutoencoderTiny"):
        ModelFolder.resolve(str(folder)).vae_fingerprint()


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("unet", ModelFolder.unet_fingerprint),
        ("vae", ModelFolder.vae_fingerprint),
        ("text_encoder_2", ModelFolder.text_fingerprint),
        ("tokenizer", ModelFolder.text_fingerprint),
        ("scheduler", ModelFolder.noise_schedule),
    ],
)
def test_a_missing_component_is_a_config_error_when_it_is_needed(folder, name, ask):
    shutil.rmtree(folder / name)
    checkpoint = ModelFolder.resolve(str(folder))
    with pytest.raises(ConfigError, match=f"no folder {name}"):
        ask(checkpoint)


def test_a_checkpoint_of_a_unet_alone_can_be_a_teacher(folder):
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    checkpoint = ModelFolder.resolve(str(folder))
    checkpoint.unet_fingerprint()
    checkpoint.noise_schedule()


def test_teachers_differ_in_the_unet_alone(tiny_family):
    first, second = (ModelFolder.resolve(str(folder)) for folder in tiny_family.teachers[:2])
    assert first.unet_fingerprint() != second.unet_fingerprint()
    assert first.vae_fingerprint() == second.vae_fingerprint()
    assert first.text_fingerprint() == second.text_fingerprint()


def test_tokenizers_saved_by_another_library_version_are_the_same(folder):
    original = ModelFolder.resolve(str(folder)).text_fingerprint()
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizerFast.from_pretrained(folder / name)
        shutil.rmtree(folder / name)
        tokenizer.save_pretrained(folder / name)
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    assert ModelFolder.resolve(str(folder)).text_fingerprint() == original


@pytest.mark.parametrize("change", ["pad token", "merges", "vocabulary", "token limit", "weight"])
def test_whatever_decides_embeddings_changes_the_text_fingerprint(folder, change):
    original = ModelFolder.resolve(str(folder)).text_fingerprint()
    tokenizer = folder / "tokenizer"
    if change == "pad token":
        change_json(tokenizer / "tokenizer_config.json", pad_token="?")
        change_json(tokenizer / "special_tokens_map.json", pad_token="?")
    elif change == "token limit":
        change_json(tokenizer / "tokenizer_config.json", model_max_length=50)
    elif change == "merges":
        merges = (tokenizer / "merges.txt").read_text().splitlines()
        (tokenizer / "merges.txt").write_text("\n".join(merges[:-1]) + "\n")
    elif change == "vocabulary":
        vocabulary = json.loads((tokenizer / "vocab.json").read_text())
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    else:
        weights = folder / "text_encoder" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    assert ModelFolder.resolve(str(folder)).text_fingerprint() != original


def test_the_noise_schedule_is_the_scheduler_files(tiny_family):
    schedule = ModelFolder.resolve(str(tiny_family.base)).noise_schedule()
    assert schedule == NoiseSchedule("epsilon", 1000, 0.00085, 0.012, "scaled_linear", False)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_noise_schedule_has_the_alphas_of_diffusers(folder, zero_terminal_snr):
    change_json(
        folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=zero_terminal_snr
    )
    ours = ModelFolder.resolve(str(folder)).noise_schedule().alphas_cumprod()
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    assert isinstance(scheduler, DDPMScheduler)
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-7)


def test_overrides_win_over_the_scheduler_file(tiny_family):
    schedule = ModelFolder.resolve(str(tiny_family.base)).noise_schedule("v_prediction", True)
    assert schedule.prediction_type == "v_prediction"
    assert schedule.zero_terminal_snr is True


def test_an_override_can_switch_zero_terminal_snr_off(folder):
    change_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    checkpoint = ModelFolder.resolve(str(folder))
    assert checkpoint.noise_schedule().zero_terminal_snr is True
    assert checkpoint.noise_schedule(zero_terminal_snr=False).zero_terminal_snr is False


def test_older_scheduler_files_predict_epsilon(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"], config["rescale_betas_zero_snr"]
    path.write_text(json.dumps(config))
    schedule = ModelFolder.resolve(str(folder)).noise_schedule()
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == ("epsilon", False)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"beta_schedule": "sigmoid"}, IncompatibleError, "sigmoid"),
        ({"prediction_type": "flow_prediction"}, IncompatibleError, "flow_prediction"),
        ({"trained_betas": [0.1, 0.2]}, IncompatibleError, "trained_betas"),
        ({"num_train_timesteps": 10**12}, CorruptError, "10000"),
        ({"beta_start": "small"}, CorruptError, "small"),
    ],
)
def test_a_schedule_that_is_not_known_is_refused(folder, fields, error, message):
    change_json(folder / "scheduler" / "scheduler_config.json", **fields)
    with pytest.raises(error, match=message):
        ModelFolder.resolve(str(folder)).noise_schedule()


def test_a_scheduler_without_betas_is_incompatible(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(IncompatibleError, match=r"FlowMatchEuler.* without num_train_timesteps"):
        ModelFolder.resolve(str(folder)).noise_schedule()
