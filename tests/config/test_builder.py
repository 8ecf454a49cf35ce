"""The rules of a builder's file that go over more than one key."""

from __future__ import annotations

import pytest

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.core.bucket import SDXL_BUCKETS, Bucket
from sdxl_distill.errors import ConfigError


def test_buckets_are_sdxls_own_by_default(builder_file):
    assert load_config(builder_file, BuilderConfig).buckets == SDXL_BUCKETS


@pytest.mark.parametrize("size", [128, 512, 640, 1024, 2048])
def test_sdxls_buckets_scale_with_the_size(builder_file, size):
    buckets = load_config(builder_file, BuilderConfig, [f"data.size={size}"]).buckets
    assert len(set(buckets)) == len(SDXL_BUCKETS)
    for bucket, original in zip(buckets, SDXL_BUCKETS, strict=True):
        assert bucket.width * 1024 == original.width * size
        assert bucket.height * 1024 == original.height * size
        assert bucket.width % 8 == bucket.height % 8 == 0


def test_a_size_that_sdxls_buckets_do_not_scale_to_is_refused(builder_file):
    with pytest.raises(ConfigError, match="data.size: SDXL's buckets cannot be scaled to 520"):
        load_config(builder_file, BuilderConfig, ["data.size=520"])


def test_without_buckets_there_is_one_square(builder_file):
    overrides = ["data.size=520", "data.bucket.enabled=false"]
    assert load_config(builder_file, BuilderConfig, overrides).buckets == (Bucket(520, 520),)


@pytest.mark.parametrize(
    ("resolutions", "message"),
    [
        ("[[64, 60]]", r"resolutions\[0\]\[1\]: 60; expected a multiple of 8"),
        ("[[64]]", r"resolutions\[0\]\[1\]: is missing"),
        ("[[64, 64, 64]]", r"resolutions\[0\]: \[64, 64, 64\]; expected at most 2 items"),
        ("[[64, 64], [64, 64]]", r"resolutions\[1\]: \[64, 64\] is listed twice"),
        ("[[0, 64]]", r"resolutions\[0\]\[0\]: 0"),
        ("[]", "expected at least 1 item"),
    ],
)
def test_a_wrong_resolution_is_refused(builder_file, resolutions, message):
    with pytest.raises(ConfigError, match=message):
        load_config(builder_file, BuilderConfig, [f"data.bucket.resolutions={resolutions}"])


def test_a_builder_without_latents_is_refused_with_the_reason(builder_file):
    with pytest.raises(ConfigError, match="data.latent_cache.enabled: false: without latents"):
        load_config(builder_file, BuilderConfig, ["data.latent_cache.enabled=false"])


@pytest.mark.parametrize(("smallest", "largest"), [(5, 5), (6, 5)])
def test_an_empty_range_of_timesteps_is_refused(builder_file, smallest, largest):
    overrides = [f"cache.min_timestep={smallest}", f"cache.max_timestep={largest}"]
    with pytest.raises(
        ConfigError, match=f"{smallest}; expected less than max_timestep, {largest}"
    ):
        load_config(builder_file, BuilderConfig, overrides)


@pytest.mark.parametrize("teacher_id", ["a", "teacher_v1", "0.9-beta", "A" * 100])
def test_a_safe_teacher_id_is_taken(builder_file, teacher_id):
    config = load_config(builder_file, BuilderConfig, [f"teacher.teacher_id={teacher_id}"])
    assert config.teacher.teacher_id == teacher_id


@pytest.mark.parametrize(
    "teacher_id",
    [
        *(
            ".",
            "..",
            ".a",
            "-a",
            "_a",
            "a/b",
            "../a",
            "a b",
            "é",
            "a\\n",
            "a\\u0000",
            "",
            "A" * 101,
        ),
        "text-0123456789ab",
    ],
)
def test_an_unsafe_teacher_id_is_refused(builder_file, teacher_id):
    with pytest.raises(ConfigError, match=r"teacher\.teacher_id"):
        load_config(builder_file, BuilderConfig, [f'teacher.teacher_id="{teacher_id}"'])


@pytest.mark.parametrize(
    ("overrides", "vae", "text"),
    [
        ([], "teacher", "teacher"),
        (["model.id=vae"], "vae", "vae"),
        (["model.text_encoder_id=text"], "text", "text"),
        (["model.id=vae", "model.text_encoder_id=text"], "vae", "text"),
    ],
)
def test_vae_and_text_encoders_come_from_the_first_that_is_set(builder_file, overrides, vae, text):
    config = load_config(builder_file, BuilderConfig, overrides)
    assert (config.vae_source, config.text_source) == (vae, text)
