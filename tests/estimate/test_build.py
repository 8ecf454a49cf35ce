"""What a dry run of the builders says, against what is then built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError
from sdxl_distill.estimate.build import estimate_predictions
from sdxl_distill.estimate.rate import measure_build_rate
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import TextEncoders


def bytes_of_files(directory: Path) -> int:
    shards = [path for path in directory.iterdir() if path.suffix in {".tar", ".idx"}]
    return sum(path.stat().st_size for path in shards)


def test_sets_are_as_large_as_estimated(built_template):
    estimate = estimate_predictions(built_template.config("cache.draws=2"))
    assert estimate.predictions.num_bytes == bytes_of_files(built_template.teacher)
    assert estimate.text.num_bytes == bytes_of_files(built_template.text)
    assert estimate.latents.num_bytes == bytes_of_files(built_template.latents)
    assert estimate.has_latents


def test_only_what_is_missing_is_to_be_done(built_template):
    estimate = estimate_predictions(built_template.config("cache.draws=5"))
    num_shards = len(list(built_template.latents.glob("*.tar")))
    assert estimate.predictions.num_shards == 5 * num_shards
    assert estimate.num_existing_shards == 2 * num_shards
    assert estimate.num_forwards == 3 * 13


def test_a_set_that_will_be_replaced_is_to_be_done_again(built_template):
    config = built_template.config("cache.draws=2", "cache.skip_existing=false")
    estimate = estimate_predictions(config)
    assert (estimate.num_existing_shards, estimate.num_forwards) == (0, 2 * 13)


def test_without_latents_every_image_file_counts(workshop):
    estimate = estimate_predictions(workshop.config("cache.draws=2"))
    assert not estimate.has_latents
    assert estimate.bucket == Bucket(128, 128)
    assert estimate.text.num_records == 10
    assert (estimate.predictions.num_shards, estimate.predictions.num_records) == (8, 20)
    assert estimate.num_forwards == 20


def test_an_estimate_writes_nothing(workshop):
    def files() -> list[Path]:
        return sorted(workshop.root.rglob("*"))

    config = workshop.config()
    before = files()
    estimate_predictions(config)
    assert files() == before


def test_without_latents_and_images_there_is_nothing_to_estimate(workshop):
    with pytest.raises(ConfigError, match="no such folder"):
        estimate_predictions(workshop.config("data.image_dir=nowhere"))


def test_text_encoders_are_counted_in_float32(workshop):
    encoders = TextEncoders.load(
        ModelFolder.resolve(str(workshop.family.base)), torch.device("cpu")
    ).encoders
    num_bytes = sum(weight.nbytes for encoder in encoders for weight in encoder.parameters())
    assert estimate_predictions(workshop.config()).text_encoder_bytes == num_bytes


def test_larger_batches_take_more_memory(workshop):
    small, large = (
        estimate_predictions(workshop.config(f"cache.batch_size={size}")).memory for size in (2, 8)
    )
    assert small.weights_bytes == large.weights_bytes
    assert 3 < large.activations_bytes / small.activations_bytes <= 4


@pytest.mark.slow
def test_this_machine_has_a_rate(workshop):
    assert measure_build_rate(workshop.config(), Bucket(128, 128)) > 0
