"""The ranks' shares of the average, brought together for a checkpoint and for validation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.distill_cache import DistillCache
from support.ranks import Ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config
from sdxl_distill.optimizer.stochastic_rounding import split_master
from sdxl_distill.train.run_folder import RunFolder

NUM_STEPS = 3


@pytest.mark.multiprocess
@pytest.mark.parametrize("exact_masters", [False, True])
def test_an_average_without_memory_is_the_student_on_every_rank(
    distill_cache: DistillCache, tmp_path: Path, exact_masters: bool
) -> None:
    settings = [
        "student.ema_decay=0",
        "student.use_bf16=true",
        f"training.exact_masters={str(exact_masters).lower()}",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=2",
        f"training.num_steps={NUM_STEPS}",
        "training.validation.fraction=0.3",
    ]
    file = distill_cache.config_file(tmp_path)
    ranks = Ranks(3, file, *(part for each in settings for part in ("--set", each)))
    assert ranks.wait() == [0, 0, 0], ranks.log.read_text()

    rounded = (lambda master: split_master(master)[0]) if exact_masters else torch.Tensor.bfloat16

    # Saved: every rank's share is in the checkpoint.
    config = load_config(file, DistillConfig)
    folder = RunFolder.of(config).checkpoints().path / f"step-{NUM_STEPS:08d}"
    student, averages = (
        load_file(folder / "student.safetensors"),
        load_file(folder / "ema.safetensors"),
    )
    assert averages.keys() == student.keys()
    for name, weight in student.items():
        assert torch.equal(rounded(averages[name]), weight), name

    # Lent: every rank's student had them when it was validated.
    logs = EventAccumulator(
        str(RunFolder.of(config).tensorboard(config.training.tensorboard.base_dir))
    )
    logs.Reload()
    raw, averaged = (
        logs.Scalars(f"distill/{name}/loss") for name in ("validation", "validation_ema")
    )
    # Lent weights are rounded to even; one in 65,536 masters lies half-way and was rounded up,
    # after which bfloat16 activations may differ by 2⁻⁸, and their squared errors by twice that.
    tolerance = 2**-7 if exact_masters else 0
    assert [event.value for event in averaged] == pytest.approx(
        [event.value for event in raw], rel=tolerance, abs=0
    )
