"""The training step on a card: it waits for nothing, and does what it does on a CPU."""

from __future__ import annotations

import pytest
import torch

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.unet import unet_geometry
from sdxl_distill.optimizer.adamw import clip_factor, global_grad_norm
from sdxl_distill.train.ema import BackgroundAverage, Ema, FollowedWeight
from sdxl_distill.train.session import load_student
from sdxl_distill.train.trainer import make_optimizer
from sdxl_distill.train.trial_step import batch_of_zeros, step_of


@pytest.fixture
def config(tiny_family) -> DistillConfig:
    return DistillConfig.model_validate(
        {
            "run": {"name": "gpu"},
            "student": {"checkpoint_path": str(tiny_family.base)},
            "teachers": [{"teacher_id": "a"}],
            "training": {"batch_size": 2, "compile_optimizer": False},
        }
    )


@pytest.mark.gpu
def test_a_step_waits_for_nothing(config):
    device = torch.device("cuda", 0)
    checkpoint = ModelFolder.resolve(config.student.checkpoint_path)
    student = load_student(config.student, checkpoint, device)
    weights = list(student.parameters())
    optimizer = make_optimizer(config.training, student.named_parameters(), "cuda")
    step = step_of(config, student, checkpoint.noise_schedule(), device)
    batch = batch_of_zeros(config, unet_geometry(checkpoint), Bucket(128, 128), 77, 2)
    pinned = batch._map(torch.Tensor.pin_memory)

    def run() -> None:
        step.backward(pinned, 2)
        optimizer.step(clip_factor(global_grad_norm(weights), 1.0))
        optimizer.zero_grad(set_to_none=True)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_average_in_main_memory_follows_as_one_on_the_card():
    device = torch.device("cuda", 0)
    weight = torch.nn.Parameter(torch.zeros(1000, device=device))
    apart = Ema([("w", weight)], 0.9, torch.device("cpu"))
    beside = Ema([("w", weight)], 0.9)
    background = BackgroundAverage(apart, device)
    for step in range(5):
        background.finish()
        with torch.no_grad():
            weight += 1
        background.start([FollowedWeight("w", weight)], step)
        beside.update([FollowedWeight("w", weight)], step)
    background.finish()
    assert torch.allclose(apart.averages["w"], beside.averages["w"].cpu())


def test_on_a_cpu_the_average_is_there_at_once():
    weight = torch.nn.Parameter(torch.ones(3))
    ema = Ema([("w", weight)], 0.5)
    with torch.no_grad():
        weight += 1
    BackgroundAverage(ema, torch.device("cpu")).start([FollowedWeight("w", weight)], 100)
    assert torch.equal(ema.averages["w"], torch.full((3,), 1.5))
