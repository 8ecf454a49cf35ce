"""Whole short runs in this process, against loops written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from support.distill_cache import WEIGHTS, DistillCache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.stream.loader import JoinedStream
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.session import train_student

pytestmark = pytest.mark.processors

Weights = dict[str, torch.Tensor]


def trained(config: DistillConfig, stem: str = "student") -> Weights:
    summary = train_student(config)
    return saved(config, summary.global_step, stem)


def saved(config: DistillConfig, step: int, stem: str = "student") -> Weights:
    folder = RunFolder.of(config).checkpoints().path
    return load_file(folder / f"step-{step:08d}" / f"{stem}.safetensors")


def start(cache: DistillCache) -> Weights:
    return UNet2DConditionModel.from_pretrained(cache.family.base / "unet").state_dict()


def distance(found: Weights, expected: Weights, origin: Weights) -> float:
    """Of two trained students, relative to how far the second one went."""
    left, right, zero = (
        torch.cat([each[name].double().flatten() for name in sorted(origin)])
        for each in (found, expected, origin)
    )
    return float((left - right).norm() / (right - zero).norm())


def test_ten_steps_are_those_of_a_plain_torch_loop(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    settings = {"lr": 3e-4, "warmup": 4, "max_norm": 0.05, "decay": 0.5, "batch": 4, "ema": 0.3}
    config = distill_cache.config(
        tmp_path,
        "training.num_steps=10",
        f"training.lr={settings['lr']}",
        f"training.warmup_steps={settings['warmup']}",
        f"training.max_grad_norm={settings['max_norm']}",
        f"training.weight_decay={settings['decay']}",
        f"student.ema_decay={settings['ema']}",
    )
    found = trained(config)
    expected, expected_ema = _torch_loop(distill_cache, settings)
    origin = start(distill_cache)
    assert distance(found, expected, origin) < 1e-4
    assert distance(saved(config, 10, "ema"), expected_ema, origin) < 1e-4


def _torch_loop(cache: DistillCache, settings: dict[str, float]) -> tuple[Weights, Weights]:
    unet = UNet2DConditionModel.from_pretrained(cache.family.base / "unet").train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=settings["lr"], weight_decay=settings["decay"]
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    average = {name: weight.clone() for name, weight in unet.state_dict().items()}
    with cache.teachers() as teachers:
        stream = JoinedStream(teachers, global_batch=4, validation_fraction=0.2)
        with stream:
            batches = stream.forever()
            for step in range(10):
                batch = next(batches)
                noisy = scheduler.add_noise(
                    batch.latents.float(), batch.noise.float(), batch.timesteps
                )
                prediction = unet(
                    noisy,
                    batch.timesteps,
                    encoder_hidden_states=batch.encoder_hidden_states.float(),
                    added_cond_kwargs={
                        "text_embeds": batch.pooled_embeds.float(),
                        "time_ids": batch.time_ids.float(),
                    },
                ).sample
                first, second = (each.float() for each in batch.predictions)
                F.mse_loss(prediction, 0.75 * first + 0.25 * second).backward()
                norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), settings["max_norm"])
                assert norm > settings["max_norm"]
                for group in optimizer.param_groups:
                    group["lr"] = settings["lr"] * min(1.0, (step + 1) / settings["warmup"])
                optimizer.step()
                optimizer.zero_grad()
                decay = min(settings["ema"], (1 + step) / (10 + step))
                for name, weight in unet.state_dict().items():
                    average[name] = decay * average[name] + (1 - decay) * weight
    return unet.state_dict(), average


@pytest.mark.parametrize(
    "settings",
    [
        ["training.optimizer=adamw"],
        ["training.optimizer=adamw_8bit"],
        ["training.optimizer=adamw", "training.exact_masters=true"],
        ["training.optimizer=adamw_8bit", "training.exact_masters=true"],
    ],
    ids=["fp32 states", "8-bit states", "fp32 states, masters", "8-bit states, masters"],
)
def test_small_updates_of_a_bfloat16_student_arrive(
    distill_cache: DistillCache, tmp_path: Path, settings: list[str]
) -> None:
    """At this rate torch's AdamW changes next to nothing: 3 % of the update.

    Weights with exact masters move in jumps of 16 bits, but their average does not.
    """
    common = ["training.lr=1e-5", "training.num_steps=6", "training.weight_decay=0"]
    (tmp_path / "fp32").mkdir()
    (tmp_path / "bf16").mkdir()
    exact = trained(distill_cache.config(tmp_path / "fp32", *common), "ema")
    config = distill_cache.config(tmp_path / "bf16", *common, *settings, "student.use_bf16=true")
    found, origin = trained(config, "ema"), start(distill_cache)
    assert all(weight.dtype == torch.bfloat16 for weight in saved(config, 6).values())

    def moved(weights: Weights, origin: Weights) -> torch.Tensor:
        return torch.cat(
            [(weights[name] - each.float()).flatten() for name, each in origin.items()]
        )

    step = moved(exact, origin)
    own = moved(found, {name: weight.bfloat16() for name, weight in origin.items()})
    assert 0.85 < float(own @ step / (step @ step)) < 1.1


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    runs = []
    for value in ("true", "false"):
        (tmp_path / value).mkdir()
        setting = f"student.use_gradient_checkpointing={value}"
        runs.append(trained(distill_cache.config(tmp_path / value, setting)))
    assert distance(runs[0], runs[1], start(distill_cache)) < 1e-4


def test_the_average_in_main_memory_is_the_same(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    runs = []
    for device in ("cpu", "auto"):
        (tmp_path / device).mkdir()
        config = distill_cache.config(tmp_path / device, f"student.ema_device={device}")
        runs.append(trained(config, "ema"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[1])


TRAIN_TAGS = {f"distill/{name}" for name in (
    "loss", "loss_ann", "loss_bob", "loss_floor", "lr", "grad_norm", "epoch", "images_per_second",
    "data_wait",
)}  # fmt: skip
VALIDATION_TAGS = {
    f"distill/{split}/{name}"
    for split in ("validation", "validation_ema")
    for name in ("loss", "loss_ann", "loss_bob", "loss_floor")
}


def events(config: DistillConfig) -> dict[str, dict[int, float]]:
    folder = RunFolder.of(config).tensorboard(config.training.tensorboard.base_dir)
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


def test_the_logs_hold_exactly_the_documented_tags(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config(tmp_path)
    summary = train_student(config)
    logged = events(config)
    stalls = logged.pop("distill/checkpoint_stall")
    assert list(stalls) == [2, 4, 6]
    assert min(stalls.values()) > 0
    assert set(logged) == TRAIN_TAGS | VALIDATION_TAGS
    for tag, values in logged.items():
        assert list(values) == ([2, 4, 6] if tag in TRAIN_TAGS else [3, 6])
        assert summary.losses[tag] == pytest.approx(values[6], rel=1e-6)
    assert 0 <= logged["distill/data_wait"][6] < 1
    for prefix in ("distill", "distill/validation", "distill/validation_ema"):
        for step, loss in logged[f"{prefix}/loss"].items():
            teachers = sum(
                weight * logged[f"{prefix}/loss_{name}"][step] for name, weight in WEIGHTS.items()
            )
            assert teachers == pytest.approx(loss + logged[f"{prefix}/loss_floor"][step], rel=1e-5)


def test_without_a_split_and_an_average_nothing_is_validated(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config(
        tmp_path, "training.validation.fraction=0", "student.use_ema=false"
    )
    train_student(config)
    assert set(events(config)) == TRAIN_TAGS | {"distill/checkpoint_stall"}
    checkpoint = RunFolder.of(config).checkpoints().path / "step-00000006"
    assert not (checkpoint / "ema.safetensors").exists()


def test_logged_rates_follow_the_schedule(distill_cache: DistillCache, tmp_path: Path) -> None:
    config = distill_cache.config(
        tmp_path,
        "training.warmup_steps=2",
        "training.lr_schedule=linear",
        "training.min_lr_ratio=0.2",
        "training.log_every=1",
        "training.lr=1.0e-4",
    )
    train_student(config)
    rates = list(events(config)["distill/lr"].values())
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.8e-4, 0.6e-4, 0.4e-4])


def test_a_resumed_run_hides_what_the_killed_one_logged_later(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    """A killed run logs up to its last step, after its last checkpoint."""
    settings = ["training.log_every=1", "training.keep_checkpoints=5"]
    config = distill_cache.config(tmp_path, *settings)
    train_student(config)
    whole = events(config)["distill/loss"]
    longer = distill_cache.config(tmp_path, *settings, "training.num_steps=7")
    train_student(longer, str(RunFolder.of(config).checkpoints().path / "step-00000004"))
    after = events(longer)
    assert list(after["distill/loss"]) == [1, 2, 3, 4, 5, 6, 7]
    assert {step: after["distill/loss"][step] for step in whole} == whole
    assert list(after["distill/validation/loss"]) == [3, 6, 7]
