"""The rules of the trainer's file that go over more than one key."""

from __future__ import annotations

import logging

import pytest

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.errors import ConfigError


def test_two_teachers_with_one_id_are_refused(distill_file):
    with pytest.raises(ConfigError, match=r'teachers\[1\]\.teacher_id: "one" is the id of teach'):
        load_config(distill_file, DistillConfig, ["teachers.1.teacher_id=one"])


@pytest.mark.parametrize("weight", ["0", "-1", "NaN", "Infinity", "1e308"])
def test_a_weight_that_is_no_share_is_refused(distill_file, weight):
    with pytest.raises(ConfigError, match=r"teachers\[0\]\.weight"):
        load_config(distill_file, DistillConfig, [f"teachers.0.weight={weight}"])


def test_weights_are_scaled_to_sum_to_one_with_a_warning(distill_file, caplog):
    config = load_config(distill_file, DistillConfig, ["teachers.0.weight=1.5"])
    assert config.normalised_weights() == (0.75, 0.25)
    assert "sum to 2" in caplog.text


def test_weights_that_sum_to_one_stay_without_a_warning(distill_file, caplog):
    caplog.set_level(logging.WARNING)
    assert load_config(distill_file, DistillConfig).normalised_weights() == (0.5, 0.5)
    assert not caplog.records


@pytest.mark.parametrize("decay", ["1", "1.5", "-0.1"])
def test_a_decay_outside_its_range_is_refused(distill_file, decay):
    with pytest.raises(ConfigError, match=r"student\.ema_decay"):
        load_config(distill_file, DistillConfig, [f"student.ema_decay={decay}"])


def test_a_warm_up_longer_than_the_run_is_refused(distill_file):
    overrides = ["training.num_steps=10", "training.warmup_steps=11"]
    with pytest.raises(ConfigError, match="warmup_steps: 11; expected at most num_steps, 10"):
        load_config(distill_file, DistillConfig, overrides)


def test_exact_masters_of_exact_weights_are_refused(distill_file):
    overrides = ["student.use_bf16=false", "training.exact_masters=true"]
    with pytest.raises(ConfigError, match=r"training\.exact_masters: true, but float32"):
        load_config(distill_file, DistillConfig, overrides)


def test_the_student_is_conditioned_by_its_own_encoders_unless_told(distill_file):
    own = load_config(distill_file, DistillConfig)
    told = load_config(distill_file, DistillConfig, ["student.text_encoder_id=other"])
    assert (own.text_source, told.text_source) == ("base", "other")
