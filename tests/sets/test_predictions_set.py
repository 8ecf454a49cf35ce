from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damages import DAMAGES
from support.oracles.tars import read_set
from support.photos import damage_pixels, write_image, write_images
from support.workshop import Workshop, identities, published_files, traces

from sdxl_distill.builder.launch import Launch
from sdxl_distill.builder.withdrawal import withdraw_set
from sdxl_distill.errors import (
    ConfigError,
    CorruptError,
    IncompatibleError,
    NumericalError,
)
from sdxl_distill.runtime.world import World
from sdxl_distill.sets.predictions_set import build_predictions_set
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.storage.location import Location

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def shards_of(directory):
    return [path for path in directory.iterdir() if path.suffix in (".tar", ".idx")]


@pytest.fixture
def teacher_copy(tiny_family, tmp_path):
    """A teacher's folder to be damaged."""
    return shutil.copytree(tiny_family.teachers[0], tmp_path / "checkpoint")


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_new_images_give_new_shards_and_nothing_else(built_workshop):
    workshop = built_workshop
    committed = identities(shards_of(workshop.teacher))
    write_images(workshop.images, 5, first=13)
    workshop.build_latents()
    built = workshop.build_shards("cache.draws=2").predictions
    after = identities(shards_of(workshop.teacher))
    assert committed.items() <= after.items()
    assert built.summary.num_built == (len(after) - len(committed)) // 2
    assert built.manifest.num_records == 2 * 18
    assert traces(workshop.root) == []


def test_more_draws_add_their_shards_and_nothing_else(built_workshop):
    workshop = built_workshop
    committed = identities(shards_of(workshop.teacher))
    built = workshop.build_shards("cache.draws=4").predictions
    added = identities(shards_of(workshop.teacher)).items() - committed.items()
    assert committed.items() <= identities(shards_of(workshop.teacher)).items()
    assert {name.split("-")[2] for name, _ in added} == {"d2", "d3"}
    assert (built.manifest.draws, built.manifest.num_records) == (4, 4 * 13)


def test_fewer_draws_than_there_are_change_nothing(built_workshop):
    before = published_files(built_workshop.teacher)
    assert built_workshop.build_shards("cache.draws=1").predictions.manifest.draws == 2
    assert published_files(built_workshop.teacher) == before


def test_draws_that_were_left_behind_by_new_images_can_be_caught_up_with(built_workshop):
    workshop = built_workshop
    write_images(workshop.images, 5, first=13)
    workshop.build_latents()
    assert workshop.build_shards("cache.draws=1").predictions.manifest.draws == 1
    assert workshop.build_shards("cache.draws=2").predictions.manifest.num_records == 2 * 18


def test_a_complete_set_is_left_alone(built_workshop):
    before = identities(built_workshop.teacher.rglob("*.*"))
    built = built_workshop.build_shards("cache.draws=2")
    assert identities(built_workshop.teacher.rglob("*.*")) == before
    assert (built.predictions.summary.num_built, built.text.summary.num_built) == (0, 0)


def test_a_rebuild_gives_the_same_bytes_in_new_files(built_workshop):
    workshop = built_workshop
    before, committed = published_files(workshop.teacher), identities(shards_of(workshop.teacher))
    text = identities(workshop.text.iterdir())
    workshop.build_shards("cache.draws=2", "cache.skip_existing=false")
    assert published_files(workshop.teacher) == before
    assert not committed.items() & identities(shards_of(workshop.teacher)).items()
    assert identities(workshop.text.iterdir()) == text
    assert traces(workshop.root) == []


def test_a_rebuild_takes_another_configuration(built_workshop):
    workshop = built_workshop
    workshop.build_shards("cache.base_seed=7", "cache.skip_existing=false")
    record = json.loads((workshop.teacher / "set.json").read_text())
    assert record["noise"]["base_seed"] == 7
    assert traces(workshop.root) == []


def test_a_withdrawn_set_is_built_anew_once(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.teacher)
    withdraw_set(Location(workshop.teacher))
    workshop.build_shards("cache.draws=2", "cache.skip_existing=false")
    assert published_files(workshop.teacher) == before
    assert traces(workshop.root) == []


def test_a_rebuild_with_a_broken_teacher_keeps_the_set_that_is_there(built_workshop, teacher_copy):
    workshop = built_workshop
    before = published_files(workshop.teacher)
    change_weights(teacher_copy, lambda tensors: tensors.popitem())
    with pytest.raises(IncompatibleError, match="missing"):
        workshop.build_shards(
            f'teacher.checkpoint_path="{teacher_copy}"', "cache.skip_existing=false"
        )
    assert published_files(workshop.teacher) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_repair_gives_the_bytes_of_an_undamaged_build(built_workshop, damage):
    workshop = built_workshop
    before = published_files(workshop.teacher)
    shards = sorted(workshop.teacher.glob("*.tar"))
    kept = identities(shards[2:])
    damage(shards[0])
    workshop.build_shards("cache.draws=2", repair=True)
    assert published_files(workshop.teacher) == before
    assert kept.items() <= identities(workshop.teacher.glob("*.tar")).items()


def test_a_repair_after_an_earlier_one_looks_at_the_set_that_is_there_now(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.teacher)
    for _ in range(2):
        damage_pixels(min(workshop.teacher.glob("*.tar")))
        workshop.build_shards("cache.draws=2", repair=True)
        assert published_files(workshop.teacher) == before
        (workshop.teacher / "manifest.json").unlink()


def test_a_repair_keeps_draws_that_are_not_wanted_now(built_workshop):
    workshop = built_workshop
    kept = identities(workshop.teacher.glob("*-d1-*.tar"))
    damage_pixels(min(workshop.teacher.glob("*.tar")))
    workshop.build_shards("cache.draws=1", repair=True)
    assert kept
    assert identities(workshop.teacher.glob("*-d1-*.tar")) == kept


def test_a_repair_rebuilds_what_was_made_from_other_latents(built_workshop):
    workshop = built_workshop
    write_images(workshop.images, 1, first=13)
    (workshop.images / "000.txt").write_text("another caption")
    workshop.build_latents(rebuild=True)
    workshop.build_shards("cache.draws=2", repair=True)
    manifest = open_shard_set(workshop.teacher).manifest
    sources = {entry.tar_sha256 for entry in open_shard_set(workshop.latents).manifest.shards}
    assert {entry.source_sha256 for entry in manifest.shards} == sources
    assert manifest.num_records == 2 * 14


def test_teachers_follow_the_latents_where_images_do_not_decode(tmp_path, tiny_family):
    workshop = Workshop(tmp_path, tiny_family)
    write_image(workshop.images / "good.png", 0, 128, 128, "good")
    damage_pixels(write_image(workshop.images / "bad.png", 1, 128, 128, "bad"))
    damage_pixels(write_image(workshop.images / "alone.png", 2, 160, 96, "alone in its shard"))
    workshop.build_latents()
    manifest = workshop.build_shards("cache.draws=2").predictions.manifest
    counts = sorted((entry.width, entry.draw, entry.num_records) for entry in manifest.shards)
    assert counts == [(128, 0, 1), (128, 1, 1), (160, 0, 0), (160, 1, 0)]
    assert len(read_set(workshop.teacher)) == 2
    assert workshop.build_shards("cache.draws=2", repair=True).predictions.manifest == manifest


FIELDS = {
    "cache.base_seed=7": "noise.base_seed 42, not 7",
    "cache.max_timestep=900": "noise.max_timestep 1000, not 900",
    "cache.layout=full": "layout 'compact', not 'full'",
    "cache.version=2": "content.version '1', not '2'",
    "teacher.use_bf16=true": "content.use_bf16 False, not True",
    "teacher.prediction_type=v_prediction": "noise_schedule.prediction_type",
    "cache.dtype=fp32": "schema",
}


@pytest.mark.parametrize("override", FIELDS)
def test_another_configuration_is_refused_with_the_field_that_differs(built_workshop, override):
    workshop = built_workshop
    before = published_files(workshop.teacher)
    with pytest.raises(IncompatibleError, match="the set there was built with") as raised:
        workshop.build_shards(override)
    assert FIELDS[override] in str(raised.value)
    assert published_files(workshop.teacher) == before


def test_another_teacher_is_refused_under_the_same_id(built_workshop, tiny_family):
    with pytest.raises(IncompatibleError, match=r"content\.teacher"):
        built_workshop.build_shards(f'teacher.checkpoint_path="{tiny_family.teachers[1]}"')


def test_another_configuration_is_refused_before_captions_are_encoded(built_workshop):
    workshop = built_workshop
    shutil.rmtree(workshop.text)
    with pytest.raises(IncompatibleError, match="base_seed"):
        workshop.build_shards("cache.base_seed=7")
    assert not list(workshop.predictions.glob("text-*"))


def test_the_same_weights_in_another_place_are_the_same_teacher(built_workshop, tiny_family):
    workshop = built_workshop
    before = identities(shards_of(workshop.teacher))
    again = shutil.copytree(tiny_family.teachers[0], workshop.root / "moved")
    workshop.build_shards("cache.draws=2", f'teacher.checkpoint_path="{again}"')
    assert identities(shards_of(workshop.teacher)) == before


def refused(workshop, kind, match, *overrides):
    """Build in vain, and find nothing committed."""
    with pytest.raises(kind, match=match) as raised:
        workshop.build_shards(*overrides)
    assert not list(workshop.teacher.glob("*.tar"))
    assert traces(workshop.root) == []
    return raised.value


@pytest.fixture
def latents_workshop(built_workshop):
    """A latents set and nothing else."""
    shutil.rmtree(built_workshop.predictions)
    return built_workshop


def test_a_missing_latents_set_names_the_command_that_builds_it(workshop):
    error = refused(workshop, ConfigError, str(workshop.latents))
    assert "tools/build_latents.py" in str(error)


def test_a_latents_set_that_is_not_complete_names_the_command_that_builds_it(latents_workshop):
    (latents_workshop.latents / "manifest.json").unlink()
    error = refused(latents_workshop, ConfigError, "not complete")
    assert "tools/build_latents.py" in str(error)


def test_a_checkpoint_of_sd_1_5_is_refused(latents_workshop, teacher_copy):
    index = json.loads((teacher_copy / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (teacher_copy / "model_index.json").write_text(json.dumps(index))
    refused(
        latents_workshop,
        IncompatibleError,
        "StableDiffusionPipeline",
        f'teacher.checkpoint_path="{teacher_copy}"',
    )


CHANGES = {
    "1 tensors missing: conv_in.bias": lambda tensors: tensors.pop("conv_in.bias"),
    "1 tensors too many: lora": lambda tensors: tensors.update(lora=torch.ones(1)),
    "conv_in.bias": lambda tensors: tensors.update({"conv_in.bias": torch.ones(3)}),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_teacher_with_other_tensors_is_refused(latents_workshop, teacher_copy, fault):
    change_weights(teacher_copy, CHANGES[fault])
    refused(latents_workshop, IncompatibleError, fault, f'teacher.checkpoint_path="{teacher_copy}"')


def test_a_teacher_with_nan_weights_is_refused(latents_workshop, teacher_copy):
    change_weights(teacher_copy, lambda tensors: tensors["conv_in.bias"].fill_(torch.nan))
    refused(
        latents_workshop, CorruptError, "conv_in.bias", f'teacher.checkpoint_path="{teacher_copy}"'
    )


def test_a_teacher_that_was_mended_needs_no_other_id(latents_workshop, teacher_copy, tiny_family):
    change_weights(teacher_copy, lambda tensors: tensors["conv_in.bias"].fill_(torch.nan))
    with pytest.raises(CorruptError):
        latents_workshop.build_shards(f'teacher.checkpoint_path="{teacher_copy}"')
    latents_workshop.build_shards(f'teacher.checkpoint_path="{tiny_family.teachers[0]}"')


def test_a_shard_with_a_prediction_beyond_its_type_is_not_committed(
    built_workshop, teacher_copy, tmp_path
):
    """The output is scaled so that one record of all exceeds float16."""
    workshop, limit = built_workshop, torch.finfo(torch.float16).max
    peaks = {
        name: float(record.tensors["teacher_pred"].abs().max())
        for name, record in read_set(workshop.teacher).items()
    }
    *_, second, largest = sorted(peaks.values())

    def scale(tensors):
        for name in ("conv_out.weight", "conv_out.bias"):
            tensors[name] *= 2 * limit / (second + largest)

    change_weights(teacher_copy, scale)
    with pytest.raises(NumericalError, match=r"\(timestep \d+\)") as raised:
        workshop.build_shards(
            f'teacher.checkpoint_path="{teacher_copy}"',
            f'cache.output_dir="{tmp_path}/scaled"',
            "cache.draws=2",
        )
    (broken,) = (name for name, peak in peaks.items() if peak == largest)
    key, _, draw = broken.partition("_d")
    assert key in str(raised.value)
    assert "cache.dtype" in str(raised.value)
    scaled = tmp_path / "scaled" / workshop.teacher.name
    assert (f"{key}_d{draw}" if draw else key) not in read_set(scaled)
    assert all(
        record.tensors["teacher_pred"].isfinite().all() for record in read_set(scaled).values()
    )
    assert traces(tmp_path) == []


def test_timesteps_beyond_the_teachers_are_refused(latents_workshop):
    error = refused(
        latents_workshop, ConfigError, r"cache\.max_timestep: 1001", "cache.max_timestep=1001"
    )
    assert "at most 1000" in str(error)


def test_text_encoders_of_another_family_are_refused(latents_workshop, tiny_family):
    other = shutil.copytree(tiny_family.base, latents_workshop.root / "other")
    config = json.loads((other / "text_encoder/config.json").read_text())
    (other / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    refused(latents_workshop, IncompatibleError, "of size 80", f'model.text_encoder_id="{other}"')


@pytest.mark.parametrize("name", ["../t", "a/b", "", ".hidden", "a b", "text-0123456789ab"])
def test_an_unsafe_teacher_id_is_refused(latents_workshop, name):
    refused(latents_workshop, ConfigError, r"teacher\.teacher_id", f'teacher.teacher_id="{name}"')


def test_cuda_is_refused_where_there_is_none_also_when_nothing_is_left_to_build(
    built_workshop, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for build in (built_workshop.build_latents, built_workshop.build_shards):
        with pytest.raises(ConfigError, match="no CUDA device"):
            build("device=cuda")


def test_a_job_array_withdraws_nothing(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.teacher)
    launch = Launch(World(), {"SLURM_ARRAY_TASK_ID": "1"})
    with pytest.raises(ConfigError, match="job array"):
        build_predictions_set(workshop.config("cache.skip_existing=false"), launch)
    with pytest.raises(ConfigError, match="job array"):
        build_predictions_set(workshop.config(), launch, repair=True)
    assert published_files(workshop.teacher) == before
