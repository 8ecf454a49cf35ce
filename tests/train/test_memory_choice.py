"""Exact masters and the average's place: the best that fits, alike for all, or a refusal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support.distill_cache import DistillCache

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import unet_geometry
from sdxl_distill.train import memory_choice
from sdxl_distill.train.checkpoint import load_checkpoint
from sdxl_distill.train.memory_choice import (
    FreeMemory,
    MemoryChoice,
    MemoryNeeds,
    Place,
    choose,
    optimizer_bytes,
)
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import load_student, train_student
from sdxl_distill.train.trial_step import backward_bytes, batch_of_zeros, step_of

BOTH = [True, False]
ANYWHERE: list[Place] = ["device", "main memory"]
# SDXL's figures at 1024², batch 4, 8-bit states, in GB: docs/sizing.md.
NEEDS = MemoryNeeds(step=6.5e9, optimizer=5.3e9, masters=5.1e9, average=10.3e9)  # pyright: ignore[reportArgumentType]


def free(device: float, main: float = 64) -> FreeMemory:
    return FreeMemory(int(device * 1e9), int(main * 1e9))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (75, MemoryChoice(exact_masters=True, average="device")),
        (28.4, MemoryChoice(exact_masters=True, average="device")),
        (28.2, MemoryChoice(exact_masters=True, average="main memory")),
        (17.7, MemoryChoice(exact_masters=True, average="main memory")),
        (17.5, MemoryChoice(exact_masters=False, average="main memory")),
        (12.4, MemoryChoice(exact_masters=False, average="main memory")),
    ],
)
def test_masters_come_before_the_average_on_the_device(
    device: float, expected: MemoryChoice
) -> None:
    assert choose(NEEDS, free(device), BOTH, ANYWHERE) == expected


def test_without_main_memory_the_average_stays_on_the_device() -> None:
    assert choose(NEEDS, free(24, main=8), BOTH, ANYWHERE) == MemoryChoice(
        exact_masters=False, average="device"
    )


def test_what_cannot_fit_is_refused_with_the_parts_and_the_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        choose(NEEDS, free(12.0), BOTH, ANYWHERE)
    message = str(caught.value)
    for part in ("activations 6.5 GB", "optimizer 5.3 GB", "average 10.3 GB in main memory",
                 "at most 11.5 GB on the device", "64.0 GB of main memory", "training.batch_size",
                 "student.use_gradient_checkpointing", "adamw_8bit"):  # fmt: skip
        assert part in message
    with pytest.raises(ConfigError, match=r"exact masters 5\.1 GB"):
        choose(NEEDS, free(17), [True], ["main memory"])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_optimizers_bytes_are_what_it_holds(
    distill_cache: DistillCache, tmp_path: Path, optimizer: str
) -> None:
    config = distill_cache.config(
        tmp_path, f"training.optimizer={optimizer}", "student.use_bf16=true",
        "training.exact_masters=true", "training.num_steps=1",
    )  # fmt: skip
    train_student(config)
    checkpoint = load_checkpoint(RunFolder.of(config).checkpoints().path / "step-00000001")
    tensors = checkpoint.tensors["optimizer"]
    masters = sum(each.nbytes for name, each in tensors.items() if name.endswith("remainder"))
    student = load_student(
        config.student, ModelFolder.resolve(config.student.checkpoint_path), torch.device("cpu")
    )
    states = sum(each.nbytes for each in tensors.values()) - masters
    assert optimizer_bytes(config.training, student, "cpu") == (states, masters)


def bf16(distill_cache: DistillCache, folder: Path, *overrides: str) -> DistillConfig:
    return distill_cache.config(folder, "student.use_bf16=true", *overrides)


def kept(config: DistillConfig, step: int) -> bool:
    path = RunFolder.of(config).checkpoints().path / f"step-{step:08d}"
    return load_checkpoint(path).state["optimizer"]["exact_masters"]


def test_auto_keeps_masters_where_there_is_memory_and_says_so(
    distill_cache: DistillCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = bf16(distill_cache, tmp_path, "training.exact_masters=auto", "training.num_steps=2")
    with caplog.at_level(logging.INFO):
        train_student(config)
    assert kept(config, 2)
    assert "exact masters on, average beside the student" in caplog.text


def test_auto_goes_on_as_its_checkpoint_did(distill_cache: DistillCache, tmp_path: Path) -> None:
    config = bf16(distill_cache, tmp_path, "training.exact_masters=false", "training.num_steps=2")
    train_student(config)
    longer = ("training.exact_masters=auto", "training.num_steps=4")
    train_student(bf16(distill_cache, tmp_path, *longer), resume="latest")
    assert not kept(config, 4)
    with pytest.raises(IncompatibleError, match="exact_masters"):
        train_student(
            bf16(distill_cache, tmp_path, "training.exact_masters=true", "training.num_steps=6"),
            resume="latest",
        )


def test_auto_does_without_masters_where_memory_is_short(
    distill_cache: DistillCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bf16(distill_cache, tmp_path, "training.exact_masters=auto", "training.num_steps=1")
    student = load_student(
        config.student, ModelFolder.resolve(config.student.checkpoint_path), torch.device("cpu")
    )
    num_weights = sum(weight.numel() for weight in student.parameters())
    # Gradients, float32 states and the average, 14 bytes a weight; masters would be two more.
    monkeypatch.setattr(memory_choice, "free_memory", lambda: int(15 * num_weights))
    train_student(config)
    assert not kept(config, 1)
    monkeypatch.setattr(memory_choice, "free_memory", lambda: int(13 * num_weights))
    with pytest.raises(ConfigError, match="a step takes"):
        train_student(config, resume="latest")


@pytest.mark.gpu
def test_a_trial_step_on_a_card_counts_gradients_and_activations(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    device = torch.device("cuda", 0)
    config = bf16(distill_cache, tmp_path)
    folder = ModelFolder.resolve(config.student.checkpoint_path)
    student = load_student(config.student, folder, device)
    gradients = sum(weight.nbytes for weight in student.parameters())
    step = step_of(config, student, folder.noise_schedule(), device)
    batch = batch_of_zeros(config, unet_geometry(folder), Bucket(128, 128), 77, 2)
    before = torch.cuda.memory_allocated(device)
    assert backward_bytes(step, batch) > gradients
    assert torch.cuda.memory_allocated(device) == before
