"""Loading: what the examples give, and what every kind of wrong input says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config, resolved_json
from sdxl_distill.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def _error(path: Path, schema: type, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, schema, overrides)
    return caught.value


def test_the_builder_example_loads():
    config = load_config(CONFIGS / "cache_builder.example.json", BuilderConfig)
    assert config.teacher.teacher_id == "teacher_v1"
    assert config.buckets == ((1024, 1024), (896, 1152))
    assert config.text_source == config.vae_source == "stabilityai/stable-diffusion-xl-base-1.0"


def test_the_trainer_example_loads():
    config = load_config(CONFIGS / "distill.example.json", DistillConfig)
    assert [teacher.weight for teacher in config.teachers] == [0.333, 0.333, 0.334]
    assert config.training.lr == 5e-6


@pytest.mark.parametrize(
    ("example", "schema"),
    [("cache_builder.example.json", BuilderConfig), ("distill.example.json", DistillConfig)],
)
def test_the_resolved_configuration_loads_as_itself(example, schema, write_config):
    config = load_config(CONFIGS / example, schema)
    assert load_config(write_config(resolved_json(config)), schema) == config


def test_the_resolved_configuration_holds_every_default(distill_file):
    resolved = json.loads(resolved_json(load_config(distill_file, DistillConfig)))
    assert resolved["training"]["optimizer"] == "auto"
    assert resolved["data"]["lanes"] is None


def test_the_schema_key_of_editors_is_allowed(write_config, builder_file):
    tree = json.loads(builder_file.read_text())
    config = load_config(builder_file, BuilderConfig)
    tree["$schema"] = "./builder.schema.json"
    assert load_config(write_config(tree), BuilderConfig) == config


def test_a_misspelt_key_is_refused_with_the_nearest_one(distill_file):
    error = _error(distill_file, DistillConfig, "teachers.1.weigth=1")
    assert error.where == "--set teachers.1.weigth=1: teachers[1].weigth"
    assert error.expected == '"teachers[1].weight"'


@pytest.mark.parametrize("key", ["batchSize", "Batch-Size", "batch_sise"])
def test_other_spellings_of_a_key_are_recognised(distill_file, key):
    assert _error(distill_file, DistillConfig, f"training.{key}=4").expected == (
        '"training.batch_size"'
    )


def test_a_key_in_the_wrong_section_is_refused_with_its_place(distill_file):
    error = _error(distill_file, DistillConfig, "checkpoint_every=5")
    assert error.action == 'move it to "training.checkpoint_every"'


def test_a_key_like_no_other_is_refused_with_the_legal_ones(distill_file):
    assert (
        _error(distill_file, DistillConfig, "run.colour=1").expected == "one of name, output_root"
    )


def test_an_error_from_the_file_names_the_file(write_config):
    path = write_config('{"teacher": {"checkpoint_path": "a", "teacher_id": "b"}, "data": {}}')
    error = _error(path, BuilderConfig)
    assert error.where == f"{path}: data.image_dir"
    assert error.found == "is missing"


def test_a_missing_section_is_refused(write_config):
    assert "run: is missing" in str(_error(write_config("{}"), DistillConfig))


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_a_file_that_is_no_object_is_refused(write_config, content):
    error = _error(write_config(content), DistillConfig)
    assert error.expected == "an object, {…}"


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("student.use_bf16=1", "1", "true or false"),
        ("training.lr=true", "true", "a number"),
        ("training.lr=Infinity", "Infinity", "a finite number"),
        ("training.lr=0", "0", "greater than 0"),
        ('training.num_steps="4"', '"4"', "an integer"),
        ("training.num_steps=4.0", "4.0", "an integer"),
        ("training.loss_type=l2", '"l2"', "'mse', 'huber' or 'smooth_l1'"),
        ("student.checkpoint_path=[1]", "[1]", "text in quotes"),
        ("student.checkpoint_path=", '""', "text that is not empty"),
        ("teachers={}", "{}", "a list, […]"),
        ("teachers=[]", "[]", "at least 1 item"),
        ("run=3", "3", "an object, {…}"),
        ("training.keep_checkpoints=1", "1", "greater than or equal to 2"),
    ],
)
def test_a_wrong_value_is_refused_with_what_belongs_there(distill_file, override, found, expected):
    error = _error(distill_file, DistillConfig, override)
    assert (error.found, error.expected) == (found, expected)


def test_all_faults_are_listed_at_once(distill_file):
    text = str(_error(distill_file, DistillConfig, "training.lr=-1", "device=tpu", "x=1"))
    assert "3 problems" in text
    assert all(place in text for place in ("training.lr: -1", 'device: "tpu"', "x: unknown key"))


def test_a_number_that_is_meant_as_text_is_taken_as_text(distill_file):
    config = load_config(distill_file, DistillConfig, ["run.name=007", "teachers.0.teacher_id=1e3"])
    assert (config.run.name, config.teachers[0].teacher_id) == ("007", "1e3")


def test_a_number_in_the_file_is_not_taken_as_text(write_config, builder_file):
    tree = json.loads(builder_file.read_text())
    tree["cache"] = {"version": 1}
    assert _error(write_config(tree), BuilderConfig).expected == "text in quotes"


def test_the_last_of_two_overrides_wins(distill_file):
    config = load_config(distill_file, DistillConfig, ["training.lr=1", "training.lr=2"])
    assert config.training.lr == 2


def test_text_that_is_no_unicode_is_refused(write_config):
    path = write_config('{"teacher": {"checkpoint_path": "\\ud800"}}')
    assert str(_error(path, BuilderConfig)).encode("utf-8")


def test_a_loaded_configuration_cannot_be_changed(distill_file):
    config = load_config(distill_file, DistillConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
