"""The number of processes changes who computes what, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_cache import DistillCache
from ranks import Ranks
from safetensors.torch import load_file

GLOBAL_BATCH = 4


def after_one_step(
    cache: DistillCache, folder: Path, world: int, *settings: str
) -> dict[str, torch.Tensor]:
    """Return AdamW's first moments: a tenth of the gradients."""
    folder.mkdir()
    ranks = Ranks(
        world,
        cache.config_file(folder),
        f"--set=training.batch_size={GLOBAL_BATCH // world}",
        "--set=training.num_steps=1",
        "--set=training.max_grad_norm=null",
        *(f"--set={each}" for each in settings),
    )
    assert ranks.wait() == [0] * world, ranks.log.read_text()
    folder = folder / "runs" / "run" / "checkpoints" / "step-00000001"
    state = load_file(folder / "optimizer.safetensors")
    return {name: tensor for name, tensor in state.items() if name.endswith("/exp_avg")}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (["student.use_gradient_checkpointing=true"], 5e-6),
        (["student.use_bf16=true", "training.exact_masters=true"], 1e-2),
    ],
    ids=["float32", "bfloat16"],
)
def test_two_processes_have_the_gradients_of_one(
    distill_cache: DistillCache, tmp_path: Path, settings: list[str], tolerance: float
) -> None:
    one = after_one_step(distill_cache, tmp_path / "one", 1, *settings)
    two = after_one_step(distill_cache, tmp_path / "two", 2, *settings)
    assert one.keys() == two.keys()
    left, right = (torch.cat([each.flatten() for each in run.values()]) for run in (two, one))
    assert (left - right).norm() / right.norm() < tolerance
    assert right.norm() > 0
