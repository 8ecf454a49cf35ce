"""The number of processes changes who computes what, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.distill_cache import DistillCache
from support.ranks import Ranks

pytestmark = pytest.mark.processors

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
        (["student.use_gradient_checkpointing=true"], 1e-5),  # seen: 1.6e-6 at most; six times that
        (
            ["student.use_bf16=true", "training.exact_masters=true"],
            1e-2,
        ),  # seen: 3.1e-3 at most; three times that
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


@pytest.mark.multiprocess
def test_a_rank_that_fails_leaves_none_waiting(distill_cache: DistillCache, tmp_path: Path) -> None:
    """A damaged record is met by one rank alone."""
    cache = DistillCache(shutil.copytree(distill_cache.root, tmp_path / "c"), distill_cache.family)
    config = cache.config_file(tmp_path)
    settings = ("--set=training.batch_size=1", "--set=training.num_steps=1000")
    for tar in (cache.root / "predictions" / "bob").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[len(content) // 2] ^= 1
        tar.write_bytes(content)
    ranks = Ranks(2, config, *settings)
    codes = ranks.wait()
    assert 3 in codes and 0 not in codes and None not in codes
    assert "CorruptError" in ranks.log.read_text()
