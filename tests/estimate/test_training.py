"""What a dry run of the trainer says, against the trainer's own objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.estimate.training import estimate_training, training_memory
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.train.ema import Ema
from sdxl_distill.train.session import load_student
from sdxl_distill.train.trainer import make_optimizer

SDXL = str(Path(__file__).parents[2] / "benchmarks/sdxl_base")
"""SDXL's published configurations; no weights."""


@pytest.fixture
def config_of(tiny_family, tmp_path):
    def make(**sections: dict) -> DistillConfig:
        fields = {
            "device": "cpu",
            "run": {"name": "plan", "output_root": str(tmp_path)},
            "student": {"checkpoint_path": str(tiny_family.base)},
            "teachers": [{"teacher_id": "a", "cache_dir": str(tmp_path / "nowhere")}],
        }
        fields |= {
            name: {**fields.get(name, {}), **section} if isinstance(section, dict) else section
            for name, section in sections.items()
        }
        return DistillConfig.model_validate(fields)

    return make


def memory_of(config: DistillConfig):
    checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
    return training_memory(config, checkpoint, Bucket(128, 128), 77)


@pytest.mark.parametrize(
    ("use_bf16", "exact_masters"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_states_are_as_large_as_the_optimizers(config_of, use_bf16, optimizer, exact_masters):
    config = config_of(
        student={"use_bf16": use_bf16},
        training={"optimizer": optimizer, "exact_masters": exact_masters},
    )
    checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
    student = load_student(config.student, checkpoint, torch.device("cpu"))
    states = make_optimizer(config.training, student.named_parameters(), "cpu").state_tensors()
    del states["steps"]
    counted = memory_of(config)
    assert counted.optimizer == sum(tensor.nbytes for tensor in states.values())
    assert counted.weights == sum(weight.nbytes for weight in student.parameters())
    assert counted.gradients == counted.weights


def test_the_average_is_as_large_as_it_is(config_of, tiny_family):
    config = config_of()
    student = load_student(
        config.student, ModelFolder.resolve(str(tiny_family.base)), torch.device("cpu")
    )
    averages = Ema(student.named_parameters(), 0.9).averages
    assert memory_of(config).ema == sum(tensor.nbytes for tensor in averages.values())
    assert memory_of(config_of(student={"use_ema": False})).ema == 0


def test_the_peak_holds_all_parts(config_of):
    memory = memory_of(config_of())
    parts = memory.weights + memory.gradients + memory.activations + memory.optimizer + memory.ema
    assert memory.peak >= parts


def test_an_average_in_main_memory_takes_nothing_on_the_device(config_of):
    beside, apart = (
        memory_of(config_of(device="cuda", student={"ema_device": place}))
        for place in ("auto", "cpu")
    )
    assert beside.peak >= apart.peak + beside.ema
    assert (beside.ema_on_device, apart.ema_on_device) == (True, False)


def test_a_gpu_has_small_states_by_default(config_of):
    on_gpu, on_cpu = (memory_of(config_of(device=device)) for device in ("cuda", "cpu"))
    assert on_gpu.optimizer < on_cpu.optimizer


def test_gradient_checkpointing_saves_activations(config_of):
    kept, computed_twice = (
        memory_of(config_of(student={"use_gradient_checkpointing": use})).activations
        for use in (False, True)
    )
    assert computed_twice < kept


def test_accumulation_keeps_all_gradients_beside_the_activations(config_of):
    once, twice, thrice = (
        memory_of(config_of(training={"gradient_accumulation_steps": count})).activations
        for count in (1, 2, 3)
    )
    assert once < twice == thrice


def test_records_are_counted_over_all_processes(config_of):
    config = config_of(training={"batch_size": 2, "gradient_accumulation_steps": 3,
                                 "num_steps": 10})  # fmt: skip
    assert estimate_training(config, num_processes=4).num_records == 2 * 3 * 10 * 4


def test_a_plan_needs_no_sets(config_of):
    estimate = estimate_training(config_of(), num_processes=1)
    assert (estimate.num_images, estimate.num_epochs) == (None, None)
    assert estimate.bucket == Bucket(1024, 1024)
    assert estimate.num_checkpoints == 3


@pytest.mark.slow
def test_sdxl_trains_in_20_gigabytes(config_of):
    config = config_of(
        device="cuda",
        student={"checkpoint_path": SDXL, "ema_device": "cpu"},
        training={"batch_size": 4},
    )
    memory = training_memory(config, ModelFolder.resolve(SDXL), Bucket(1024, 1024), 77)
    assert memory.weights == memory.gradients == 2 * 2_567_463_684
    assert memory.ema == 4 * 2_567_463_684
    assert 16e9 < memory.peak < 20e9
