"""Optimizer and run, bit for bit, against loops in numpy and plain torch; on every processor.

Gradients of a bfloat16 network differ by instruction set, and twenty steps make a percent of it.
The same process computes both sides here, so that nothing needs to be allowed for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from support.distill_cache import WEIGHTS, DistillCache
from support.optimizer_cases import MODES, exact_weight, gradients, own
from support.oracles.adamw import Floats, Moments, PlainAdamW
from support.oracles.loss_curve import logged_losses

from sdxl_distill.core.noise_schedule import NoiseSchedule
from sdxl_distill.stream.batch import JoinedBatch
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import train_student

pytestmark = pytest.mark.processors

NUM_STEPS, BATCH, LR, DECAY, WARMUP = 8, 4, 5e-4, 0.5, 3


def rows_of(tensor: torch.Tensor) -> Floats:
    """As float32 [rows, elements of a row]; a vector has rows of one."""
    matrix = torch.atleast_1d(tensor.detach()).to(torch.float32, copy=True)
    return matrix.reshape(matrix.shape[0], -1).numpy()


def all_equal(tensor: torch.Tensor, expected: Floats) -> bool:
    return np.array_equal(rows_of(tensor).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("mode", [mode for mode in MODES if "fp16" not in mode])
def test_every_mode_has_the_bits_of_plain_float32_arithmetic(mode: str) -> None:
    dtype, settings = MODES[mode]
    named, optimizer = own(mode)
    plain = PlainAdamW(lr=1e-3, seed=7, rounds=dtype == torch.bfloat16, **settings)
    expected = [Moments(rows_of(parameter)) for _, parameter in named]
    for step, step_gradients in enumerate(gradients(named, 12), start=1):
        for number, gradient in enumerate(step_gradients):
            named[number][1].grad = gradient.to(dtype)
            plain.step(expected[number], rows_of(gradient.to(dtype)), step, number)
        optimizer.step()
        for (name, parameter), moments in zip(named, expected, strict=True):
            assert all_equal(parameter, plain.weight(moments)), (name, step)
            assert all_equal(exact_weight(optimizer, parameter), moments.exact), (name, step)


def test_a_bfloat16_run_with_8_bit_states_has_the_bits_of_a_plain_loop(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config(
        tmp_path,
        "student.use_bf16=true",
        "training.optimizer=adamw_8bit",
        f"training.num_steps={NUM_STEPS}",
        f"training.checkpoint_every={NUM_STEPS}",
        f"training.lr={LR}",
        f"training.weight_decay={DECAY}",
        f"training.warmup_steps={WARMUP}",
        "training.max_grad_norm=null",
        "training.log_every=1",
    )
    train_student(config)
    path = RunFolder.of(config).checkpoints().path / f"step-{NUM_STEPS:08d}/student.safetensors"
    weights, losses = plain_loop(distill_cache, config.training.seed)
    found = load_file(path)
    assert found.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(found[name], weights[name])] == []
    assert logged_losses(config) == pytest.approx(losses, rel=BATCH * 2**-23)


def plain_loop(cache: DistillCache, seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train with diffusers, numpy and torch's own loss; return weights and the loss per step."""
    unet = UNet2DConditionModel.from_pretrained(cache.family.base / "unet")
    unet.train().to(torch.bfloat16)
    plain = PlainAdamW(LR, weight_decay=DECAY, states="8bit", seed=seed)
    expected = {name: Moments(rows_of(weight)) for name, weight in unet.named_parameters()}
    losses: list[float] = []
    with (
        cache.teachers() as teachers,
        JoinedStream(teachers, global_batch=BATCH, validation_fraction=0.2, seed=seed) as stream,
    ):
        batches = stream.forever()
        for step in range(1, NUM_STEPS + 1):
            loss = plain_loss(unet, next(batches))
            loss.backward()
            losses.append(loss.item())
            rate = LR * min(1.0, step / WARMUP)
            for number, (name, weight) in enumerate(unet.named_parameters()):
                assert weight.grad is not None
                plain.step(expected[name], rows_of(weight.grad), step, number, lr=rate)
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(expected[name].exact).view(weight.shape))
            unet.zero_grad()
    return unet.state_dict(), losses


def plain_loss(unet: UNet2DConditionModel, batch: JoinedBatch) -> torch.Tensor:
    alphas = NoiseSchedule().alphas_cumprod()[batch.timesteps.numpy()].reshape(-1, 1, 1, 1)
    signal, deviation = (np.sqrt(each).astype(np.float32) for each in (alphas, 1 - alphas))
    noisy = signal * batch.latents.float().numpy() + deviation * batch.noise.float().numpy()
    prediction = unet(
        torch.from_numpy(noisy).bfloat16(),
        batch.timesteps,
        encoder_hidden_states=batch.encoder_hidden_states.bfloat16(),
        added_cond_kwargs={
            "text_embeds": batch.pooled_embeds.bfloat16(),
            "time_ids": batch.time_ids.float(),
        },
    ).sample
    shares = zip(WEIGHTS.values(), batch.predictions, strict=True)
    target = torch.stack([share * each.float() for share, each in shares]).sum(0)
    return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1).mean()
