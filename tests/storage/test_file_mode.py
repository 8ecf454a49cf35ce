"""What anybody may read is the umask's to say, whichever library wrote the file."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.distill_cache import DistillCache
from support.forked_command import ForkedCommand

from sdxl_distill.demo.family import Family
from sdxl_distill.storage.file_mode import follow_umask

UMASKS = [0o022, 0o002, 0o077]


def modes(root: Path) -> dict[str, int]:
    """The mode of every path below a folder."""
    return {path.relative_to(root).as_posix(): stat.S_IMODE(path.stat().st_mode)
            for path in root.rglob("*")}  # fmt: skip


def plain_modes(root: Path, umask: int) -> dict[str, int]:
    return {path.relative_to(root).as_posix(): (0o777 if path.is_dir() else 0o666) & ~umask
            for path in root.rglob("*")}  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize("umask", UMASKS, ids=oct)
def test_a_run_its_checkpoints_logs_and_export_follow_the_umask(
    distill_cache: DistillCache, tmp_path: Path, umask: int
) -> None:
    arguments = ("--config", str(distill_cache.config_file(tmp_path)))
    command = ForkedCommand(
        *("train", *arguments, "--set", "training.num_steps=1"),
        output=tmp_path / "log",
        limits=partial(os.umask, umask),
    )
    assert command.wait() == 0, command.output
    for folder in (tmp_path / "runs", tmp_path / "logs"):
        found = modes(folder)
        assert found == plain_modes(folder, umask)
    assert "run/export/unet/diffusion_pytorch_model.safetensors" in modes(tmp_path / "runs")


@pytest.mark.multiprocess
def test_shards_and_loose_records_follow_the_umask(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    umask = 0o002
    loose = tmp_path / "out" / "loose"
    cache_dir = str(distill_cache.root / "predictions" / "ann")
    for arguments in (
        ("unpack-shards", "--cache-dir", cache_dir, "--output", str(loose)),
        ("pack-shards", "--input", str(loose), "--output", str(tmp_path / "out" / "packed" / "ann"),
         "--latents", str(distill_cache.root / "latents")),
    ):  # fmt: skip
        command = ForkedCommand(
            *arguments, output=tmp_path / "log", limits=partial(os.umask, umask)
        )
        assert command.wait() == 0, command.output
    assert modes(tmp_path / "out") == plain_modes(tmp_path / "out", umask)
    assert len(list(tmp_path.rglob("*.tar"))) > 1


def test_the_demos_family_may_be_read_by_all_whom_the_umask_lets(tiny_family: Family) -> None:
    root = tiny_family.base.parent
    assert modes(root) == plain_modes(root, umask=0o022)


def test_whatever_modes_files_had_they_get_those_of_new_ones(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "script").touch(0o755)
    (folder / "inner").chmod(0o555)
    (folder / "read_only").touch(0o400)
    outside = tmp_path / "outside"
    outside.touch(0o600)
    (folder / "link").symlink_to(outside)
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    follow_umask(folder)
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    (folder / "link").unlink()
    assert modes(folder) == plain_modes(folder, umask=0o022)
    assert sorted(path.name for path in folder.iterdir()) == [
        "inner", "model.safetensors", "read_only",
    ]  # fmt: skip
