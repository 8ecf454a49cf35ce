from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xxhash
from support.oracles.draw import noise_of, seed_of, timestep_of
from support.oracles.pipeline import PipelineOracle
from support.oracles.tars import Record, read_set
from support.workshop import TEACHER_ID

from sdxl_distill.shards.shard_set import open_shard_set

pytestmark = pytest.mark.processors

EMBEDDINGS = {"encoder_hidden_states", "pooled_embeds"}
COMPACT = {"teacher_pred", "timestep", "seed", "resolution"}
FULL = COMPACT | EMBEDDINGS | {"noise"}


class Variant(NamedTuple):
    """How a set is built, and what the oracle has to do otherwise for it."""

    overrides: list[str]
    draws: int = 1
    base_seed: int = 42
    timesteps: tuple[int, int] = (0, 1000)
    dtype: torch.dtype = torch.float32
    stored_dtype: torch.dtype = torch.float16
    tolerance: float = 5e-3
    scheduler: Mapping[str, Any] = MappingProxyType({})


VARIANTS = {
    "full": Variant(["cache.layout=full"]),
    "full-fp32-2-draws": Variant(
        ["cache.layout=full", "cache.dtype=fp32", "cache.draws=2"],
        draws=2,
        stored_dtype=torch.float32,
        tolerance=1e-5,
    ),
    "compact-3-draws": Variant(
        [
            "cache.draws=3",
            "cache.base_seed=7",
            "cache.min_timestep=200",
            "cache.max_timestep=700",
            "cache.batch_size=1",
        ],
        draws=3,
        base_seed=7,
        timesteps=(200, 700),
    ),
    "bf16": Variant(
        ["teacher.use_bf16=true", "cache.dtype=bf16"],
        dtype=torch.bfloat16,
        stored_dtype=torch.bfloat16,
        # Batches of two and of one, rounded to 8 bits: 1.9e-2 at most under any instruction set.
        tolerance=4e-2,
    ),
    "zero-terminal-snr": Variant(
        [
            "teacher.prediction_type=v_prediction",
            "teacher.zero_terminal_snr=true",
            "cache.min_timestep=900",
        ],
        timesteps=(900, 1000),
        scheduler={"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ),
}


class Built(NamedTuple):
    """A predictions set of the photos, read with webdataset, with the latents it follows."""

    variant: Variant
    records: dict[str, Record]
    latents: dict[str, Record]
    record: dict[str, Any]


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def built(request, photo_workshop, tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp("predictions")
    built = photo_workshop.build_shards(f'cache.output_dir="{folder}"', *request.param.overrides)
    teacher = folder / TEACHER_ID
    assert built.predictions.manifest.draws == request.param.draws
    return Built(
        request.param,
        read_set(teacher),
        read_set(photo_workshop.latents),
        json.loads((teacher / "set.json").read_text()),
    )


@pytest.fixture(scope="module")
def oracle(built, tiny_family):
    return PipelineOracle(tiny_family.teachers[0], built.variant.dtype, **built.variant.scheduler)


@pytest.fixture(scope="module")
def text_oracle(tiny_family):
    return PipelineOracle(tiny_family.base)


def each(built):
    """Yield (key, draw, record) of every record that there should be."""
    for key in built.latents:
        for draw in range(built.variant.draws):
            yield key, draw, built.records[f"{key}_d{draw}" if draw else key]


def test_there_is_one_record_for_every_image_and_draw(built):
    assert len(built.records) == len(built.latents) * built.variant.draws
    assert len(list(each(built))) == len(built.records)


def test_records_hold_the_tensors_of_their_layout(built):
    expected = FULL if built.record["layout"] == "full" else COMPACT
    assert {frozenset(record.tensors) for record in built.records.values()} == {frozenset(expected)}


def test_seeds_timesteps_and_resolutions_follow_from_the_image_id(built):
    variant = built.variant
    for key, draw, record in each(built):
        image_id, _, size = key.partition("_")
        seed = seed_of(image_id, variant.base_seed, draw)
        step = timestep_of(image_id, variant.base_seed, draw, *variant.timesteps)
        assert record.tensors["seed"].tolist() == [seed]
        assert record.tensors["timestep"].tolist() == [step]
        assert record.tensors["resolution"].tolist() == [int(side) for side in size.split("x")]
        integers = {name: record.tensors[name].dtype for name in ("seed", "timestep", "resolution")}
        assert list(integers.values()) == [torch.int64, torch.int64, torch.int32]


def expected_noise(key: str, draw: int, base_seed: int) -> np.ndarray:
    image_id, _, size = key.partition("_")
    width, height = (int(side) for side in size.split("x"))
    return noise_of(seed_of(image_id, base_seed, draw), width, height)


def test_noise_follows_from_the_seed_where_it_is_stored(built):
    for key, draw, record in each(built):
        if "noise" in record.tensors:
            expected = expected_noise(key, draw, built.variant.base_seed)
            assert np.array_equal(record.tensors["noise"].numpy(), expected)


def test_embeddings_equal_those_of_encode_prompt_where_they_are_stored(built, text_oracle):
    for key, _, record in each(built):
        if record.tensors.keys() >= EMBEDDINGS:
            caption = built.latents[key].sidecar["captions"][0]
            hidden, pooled = text_oracle.embeddings(caption)
            assert torch.equal(record.tensors["encoder_hidden_states"], hidden)
            assert torch.equal(record.tensors["pooled_embeds"], pooled)


def test_predictions_are_those_of_the_pipelines_unet(built, oracle, text_oracle):
    for key, draw, record in each(built):
        latents = built.latents[key]
        expected = oracle.prediction(
            latents.tensors["latents"],
            torch.from_numpy(expected_noise(key, draw, built.variant.base_seed)),
            record.tensors["timestep"].item(),
            text_oracle.embeddings(latents.sidecar["captions"][0]),
            latents.tensors["time_ids"],
        )
        stored = record.tensors["teacher_pred"]
        assert stored.dtype == built.variant.stored_dtype
        error = (stored.float() - expected).norm() / expected.norm()
        assert error < built.variant.tolerance, (key, draw)


def test_the_noise_schedule_is_the_one_that_the_oracle_uses(built, oracle):
    declared = built.record["noise_schedule"]
    config = oracle.scheduler.config
    assert declared == {
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        "zero_terminal_snr": config.rescale_betas_zero_snr,
    }


def test_records_say_whose_they_are_and_what_they_came_from(built, photo_workshop):
    for record in built.records.values():
        place = record.tar.removeprefix(TEACHER_ID)
        for draw in range(1, built.variant.draws):
            place = place.replace(f"-d{draw}-", "-")
        source = (photo_workshop.latents / f"latents{place}").read_bytes()
        assert record.metadata == {
            "fingerprint": built.record["fingerprint"],
            "source_sha256": hashlib.sha256(source).hexdigest(),
        }


def test_a_compact_sets_index_holds_the_digest_of_the_noise(built_workshop):
    with open_shard_set(built_workshop.teacher) as teacher:
        for name in teacher.manifest.names():
            index = teacher.index(name)
            for number, digest in enumerate(index.noise_digests):
                noise = expected_noise(index.key(number), name.draw, 42)
                assert int(digest) == xxhash.xxh3_64_intdigest(noise.tobytes())


def test_a_v_prediction_checkpoint_is_taken_by_its_word(workshop, make_family):
    family = make_family(prediction_type="v_prediction", num_teachers=1)
    workshop.build_latents()
    workshop.build_shards(f'teacher.checkpoint_path="{family.teachers[0]}"')
    record = json.loads((workshop.teacher / "set.json").read_text())
    assert record["noise_schedule"]["prediction_type"] == "v_prediction"
