"""No folder of a configuration may lie in the folder of a set."""

from __future__ import annotations

import pytest

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("cache.output_dir=here/latents", "cache.output_dir"),
        ("cache.output_dir=here/latents/predictions", "cache.output_dir"),
        ("cache.output_dir=here/other/../latents", "cache.output_dir"),
        ("data.image_dir=here/latents/images", "data.image_dir"),
        ("data.image_dir=here/latents", "data.image_dir"),
        ("cache.output_dir=here/link", "cache.output_dir"),
    ],
)
def test_predictions_and_images_lie_outside_the_latents(
    builder_file, override, key, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/latents").mkdir(parents=True)
    (tmp_path / "here/link").symlink_to("latents")
    overrides = ["data.latent_cache.cache_dir=here/latents", override]
    with pytest.raises(ConfigError, match=f"{key}.* lies in the folder of the latents set"):
        load_config(builder_file, BuilderConfig, overrides)


@pytest.mark.parametrize("place", ["predictions/ann", "predictions/ann/latents"])
def test_latents_lie_outside_the_predictions(builder_file, place):
    overrides = [
        "teacher.teacher_id=ann",
        "cache.output_dir=predictions",
        f"data.latent_cache.cache_dir={place}",
    ]
    with pytest.raises(ConfigError, match="lies in the folder of the predictions set"):
        load_config(builder_file, BuilderConfig, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cache.output_dir=cache", "data.latent_cache.cache_dir=cache/latents"],
        ["data.image_dir=here", "data.latent_cache.cache_dir=here/latents"],
        ["data.latent_cache.cache_dir=cache/latents", "cache.output_dir=cache/latents-2"],
    ],
)
def test_folders_beside_and_around_a_set_are_fine(builder_file, overrides):
    load_config(builder_file, BuilderConfig, overrides)


@pytest.mark.parametrize("key", ["run.output_root", "training.tensorboard.base_dir"])
def test_runs_and_logs_lie_outside_the_sets(distill_file, key):
    for override in (
        "data.latent_cache.cache_dir=here",
        'teachers=[{"teacher_id": "inner", "cache_dir": "here/..", "weight": 1}]',
    ):
        place = "here" if "latent" in override else "inner/runs"
        with pytest.raises(ConfigError, match=f"{key}.* lies in the folder of"):
            load_config(distill_file, DistillConfig, [override, f"{key}={place}"])


def test_a_link_onto_itself_is_refused_when_it_is_opened_only(builder_file, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    overrides = [f"data.latent_cache.cache_dir={tmp_path / 'loop'}"]
    load_config(builder_file, BuilderConfig, overrides)
