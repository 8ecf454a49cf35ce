from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.verify.siblings import compare_sets


def found(path, other):
    with open_shard_set(path) as shard_set, open_shard_set(other) as sibling:
        return compare_sets(shard_set, sibling)


def messages(path, other):
    return [finding.error.found for finding in found(path, other)]


@pytest.mark.parametrize("layouts", [("full", "full"), ("compact", "full")])
def test_sets_that_belong_together_have_no_finding(sets, teachers, layouts):
    a, b = (Path(str(teacher.location)) for teacher in teachers(*layouts, draws=2))
    latents = sets.root / "latents"
    for pair in ((a, b), (b, a), (a, latents), (latents, a)):
        assert found(*pair) == []


def test_a_text_set_belongs_to_the_latents_and_to_compact_predictions(sets):
    text = sets.text()
    teacher = sets.teacher("a", "compact", draws=2)
    for pair in ((text, teacher), (teacher, text), (text, sets.root / "latents")):
        assert found(*pair) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"base_seed": 7}}, "noise.base_seed 42"),
        ({"recipe": {"min_timestep": 5}}, "noise.min_timestep 0"),
        ({"recipe": {"max_timestep": 900}}, "noise.max_timestep 1000"),
        ({"schedule": NoiseSchedule(beta_end=0.02)}, "noise_schedule.beta_end 0.012"),
        ({"draws": 2}, "1 draws"),
    ],
)
def test_another_question_is_found_with_its_field(sets, changes, message):
    texts = messages(sets.teacher("a"), sets.teacher("b", **changes))
    assert len(texts) == 1
    assert message in texts[0]


def test_teachers_may_differ_in_prediction_type(sets):
    b = sets.teacher("b", schedule=NoiseSchedule(prediction_type="v_prediction"))
    assert found(sets.teacher("a"), b) == []


@pytest.mark.parametrize("tensor", ["seed", "timestep", "noise"])
def test_a_question_that_differs_in_the_records_alone_is_found_by_key(sets, tensor):
    change = {tensor: lambda values: np.roll(values, 1) + np.array(1).astype(values.dtype)}
    findings = found(sets.teacher("a"), sets.teacher("b", change=change))
    assert {finding.error.found.partition(" than")[0] for finding in findings if finding.key} == {
        f"another {tensor}"
    }
    assert {finding.shard for finding in findings} >= {"a-64x64-000000.tar", "a-64x128-000001.tar"}


def test_shards_that_one_set_lacks_are_counted(sets):
    lacking = sets.teacher("b", without=[(64, 64, 1), (64, 128, 0)])
    (text,) = messages(sets.teacher("a"), lacking)
    assert text == "set b lacks 2 shards that set a has, the first is 1 of 64x64"
    assert messages(lacking, sets.root / "teachers" / "a") == [text]


def test_every_stale_shard_is_found(sets, tmp_path):
    teacher = sets.teacher("a", draws=2)
    later = type(sets)(tmp_path / "later", sets.shard_sizes)
    texts = messages(teacher, later.latents(salt="later"))
    assert len(texts) == 2 * len(sets.shard_sizes)
    assert all("one of them is stale" in text for text in texts)


def test_latents_of_another_configuration_are_found(sets, tmp_path):
    teacher = sets.teacher("a")
    other = type(sets)(tmp_path / "other", sets.shard_sizes)
    findings = found(teacher, other.latents(vae="9" * 64))
    assert findings[0].error.found.startswith("latents ")
    assert findings[0].error.exit_code == 4


def test_a_text_set_that_the_predictions_were_not_made_from_is_found(sets):
    sets.text()
    teacher = sets.teacher("a", "compact")
    other = sets.text("8" * 64)
    (text,) = messages(teacher, other)
    assert "set a was made from text set" in text


def test_other_keys_in_a_shard_are_found(sets):
    teacher = sets.teacher("a")
    with open_shard_set(teacher) as shard_set:
        manifest = shard_set.manifest
    entry = manifest.shards[0]._replace(keys_digest="0" * 64)
    manifest = replace(manifest, shards=(entry, *manifest.shards[1:]))
    (teacher / "manifest.json").write_bytes(manifest.to_bytes())
    (finding,) = found(teacher, sets.root / "latents")
    assert finding.shard == entry.name("a").tar
    assert "keys are not those of" in finding.error.found


def test_a_set_beside_itself_is_found(sets):
    teacher = sets.teacher("a")
    assert "two sets with the id a" in messages(teacher, teacher)[0]
