from __future__ import annotations

import shutil

import numpy as np
import pytest
import safetensors.numpy

from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.loose.folder import LooseRecord
from sdxl_distill.loose.pack import pack_set
from sdxl_distill.loose.unpack import unpack_set
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.verify.recompute import choose_records, recompute_records

ALL = 1000


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_family):
    """Ten images, a compact teacher with two draws and one in layout full."""
    from support.photos import write_images
    from support.workshop import Workshop

    root = tmp_path_factory.mktemp("recompute")
    write_images(root / "images", 10)
    workshop = Workshop(root, tiny_family)
    workshop.build_latents()
    workshop.build_shards("cache.draws=2")
    workshop.build_shards(*FULL)
    workshop.build_shards(*BF16)
    return workshop


FULL = ("teacher.teacher_id=full", "cache.layout=full", "cache.draws=2")
BF16 = ("teacher.teacher_id=bf16", "teacher.use_bf16=true")


@pytest.mark.parametrize(
    ("set_id", "overrides", "bound"),
    [("teacher_a", (), 5e-3), ("full", FULL, 5e-3), ("bf16", BF16, 3e-2)],
)
def test_the_teacher_gives_the_same_predictions_again(built, set_id, overrides, bound):
    with open_shard_set(built.predictions / set_id) as predictions:
        done = recompute_records(built.config(*overrides), predictions, ALL, seed=0)
        assert done.num_records == predictions.manifest.num_records
    assert done.findings == []
    assert done.largest_difference < bound


def _with_changed_record(built, set_id, tensor, change, tmp_path):
    """Change one tensor of one record and pack the set anew, with good digests throughout."""
    path = built.predictions / set_id
    unpack_set(path, tmp_path / "loose")
    with open_shard_set(path) as shard_set:
        name = shard_set.manifest.names()[0]
        image_id = shard_set.index(name).image_id(0)
    record = tmp_path / "loose" / LooseRecord(name.width, name.height, 0, image_id).file_name
    content = bytearray(record.read_bytes())
    old = safetensors.numpy.load(bytes(content))[tensor]
    position = content.index(old.tobytes())
    content[position : position + old.nbytes] = change(old).astype(old.dtype).tobytes()
    record.write_bytes(content)
    pack_set(tmp_path / "loose", tmp_path / "packed", built.latents)
    return tmp_path / "packed", name.key(image_id)


@pytest.mark.parametrize(
    ("set_id", "tensor", "change", "message"),
    [
        ("teacher_a", "teacher_pred", lambda values: values * 1.01, "teacher_pred differs by 0.9"),
        ("full", "teacher_pred", np.negative, "teacher_pred differs by 200"),
        ("full", "timestep", lambda values: (values + 1) % 1000, "timestep are not what"),
    ],
)
def test_a_wrong_record_under_good_digests_is_found_by_key(
    built, tmp_path, set_id, tensor, change, message
):
    path, key = _with_changed_record(built, set_id, tensor, change, tmp_path)
    overrides = FULL if set_id == "full" else ()
    if set_id == "teacher_a":  # the text set is looked for beside the predictions
        place = built.predictions / "packed"
        shutil.copytree(path, place)
        path = place
    try:
        with open_shard_set(path) as predictions:
            findings = recompute_records(built.config(*overrides), predictions, ALL, 0).findings
    finally:
        shutil.rmtree(path)
    assert [finding.key for finding in findings] == [key]
    assert findings[0].error.found.startswith(message)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("teacher.use_bf16=true", "use_bf16 True"),
        ("teacher.prediction_type=v_prediction", "noise_schedule.prediction_type 'v_prediction'"),
        ("checkpoint", "teacher '"),
    ],
)
def test_another_teacher_is_refused_with_the_field(built, override, field):
    if override == "checkpoint":
        override = f"teacher.checkpoint_path={built.family.teachers[1]}"
    with (
        open_shard_set(built.teacher) as predictions,
        pytest.raises(IncompatibleError, match="another teacher") as caught,
    ):
        recompute_records(built.config(override), predictions, 1, seed=0)
    assert field in caught.value.found


def test_latents_cannot_be_computed_again(built):
    with (
        open_shard_set(built.latents) as latents,
        pytest.raises(ConfigError, match="is a latents set"),
    ):
        recompute_records(built.config(), latents, 1, seed=0)


def test_records_are_drawn_without_repetition_and_follow_from_the_seed(built):
    with open_shard_set(built.teacher) as predictions:
        manifest = predictions.manifest
        everyone = [
            (entry.name(predictions.id), number)
            for entry in manifest.shards
            for number in range(entry.num_records)
        ]
    assert choose_records(manifest, ALL, seed=1) == everyone
    drawn = choose_records(manifest, 5, seed=1)
    assert drawn == choose_records(manifest, 5, seed=1)
    assert len(set(drawn)) == 5
    assert drawn != choose_records(manifest, 5, seed=2)
