"""Checkpoints that are whole or not there, and the one before as the fallback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.patience import wait_until

from sdxl_distill.errors import ConfigError, CorruptError, StorageError
from sdxl_distill.train.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    load_checkpoint,
    step_of_checkpoint,
)


def checkpoint_of(step: int) -> Checkpoint:
    weights = torch.arange(64.0).to(torch.bfloat16) + step
    moments = torch.full((64,), step % 256, dtype=torch.uint8)
    return Checkpoint(
        {"position": {"global_step": step}},
        {"student": {"weight": weights}, "optimizer": {"weight/exp_avg_codes": moments}},
    )


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint_of(7)
    path = CheckpointFolder(tmp_path).save(7, saved)
    loaded = load_checkpoint(path)
    assert path.name == "step-00000007"
    assert (tmp_path / "latest").read_text() == path.name
    assert loaded.state == saved.state
    for stem, tensors in saved.tensors.items():
        for name, tensor in tensors.items():
            assert loaded.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[stem][name], tensor)


def test_the_oldest_go_and_at_least_two_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 10, 20):
        folder.save(step, checkpoint_of(step))
    assert folder.steps() == [10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "step-00000010", "step-00000020",
    ]  # fmt: skip


FILES = ["student.safetensors", "optimizer.safetensors", "state.json", "files.json"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, checkpoint_of(1))
    victim = folder.save(2, checkpoint_of(2)) / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(CorruptError, match="step-00000002"):
        load_checkpoint(victim.parent)
    path, loaded = folder.load_latest()
    assert path.name == "step-00000001"
    assert loaded.state["position"]["global_step"] == 1
    assert "falling back" in caplog.text


def test_no_checkpoint_at_all_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without --resume"):
        CheckpointFolder(tmp_path / "checkpoints").load_latest()
    with pytest.raises(ConfigError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-00000001")


def test_a_path_in_the_list_of_files_is_not_followed(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(1, checkpoint_of(1))
    listed = (path / "files.json").read_text().replace('{"opt', '{"../latest":"0","opt')
    (path / "files.json").write_text(listed)
    with pytest.raises(CorruptError, match="missing"):
        load_checkpoint(path)


WRITER = """
import sys
from pathlib import Path
import torch
from sdxl_distill.train.checkpoint import Checkpoint, CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]))
print("ready", flush=True)
for step in range(1, 100_000):
    weight = torch.full((200_000,), float(step))
    tensors = {"student": {"weight": weight}, "optimizer": {"steps": torch.tensor([step])}}
    folder.save(step, Checkpoint({"step": step}, tensors))
"""


@pytest.mark.parametrize("stem", ["student", "optimizer"])
def test_a_list_of_files_without_a_necessary_one_is_damage(tmp_path: Path, stem: str) -> None:
    whole = checkpoint_of(1)
    rest = {name: tensors for name, tensors in whole.tensors.items() if name != stem}
    path = CheckpointFolder(tmp_path).save(1, Checkpoint(whole.state, rest))
    with pytest.raises(CorruptError, match=f"{stem}.safetensors is not listed"):
        load_checkpoint(path)


def test_going_on_from_an_older_one_replaces_what_came_after_it(tmp_path: Path) -> None:
    """As after damage, or when told to: what a run gave up must not be taken for its latest."""
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (5, 10, 15):
        folder.save(step, checkpoint_of(step))
    changed = checkpoint_of(10)
    changed.state["again"] = True
    folder.save(10, changed)
    assert folder.steps() == [5, 10]
    path, loaded = folder.load_latest()
    assert path.name == (tmp_path / "latest").read_text() == "step-00000010"
    assert loaded.state["again"]


def test_what_is_set_aside_is_whole_and_no_longer_the_runs(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=9)
    for step in (5, 10, 15):
        folder.save(step, checkpoint_of(step))
    aside = folder.set_aside(10)
    assert aside is not None
    assert folder.steps() == [5]
    assert folder.load_latest()[0].name == "step-00000005"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000010", "step-00000015"]
    assert load_checkpoint(aside / "step-00000015").state == checkpoint_of(15).state
    assert folder.set_aside(10) is None
    assert folder.set_aside(5) == tmp_path / "set-aside-2"
    with pytest.raises(ConfigError, match="set aside") as refused:
        folder.require_none_aside()
    assert str(tmp_path / "set-aside-2" / "step-00000005") in str(refused.value)


def test_the_step_of_a_checkpoint_is_known_without_reading_its_tensors(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(7, checkpoint_of(7))
    assert step_of_checkpoint(path) == 7
    renamed = path.rename(tmp_path / "best")
    assert step_of_checkpoint(renamed) == 7
    (renamed / "state.json").write_text('{"position": {"global_step": "soon"}}')
    with pytest.raises(CorruptError, match="no position"):
        step_of_checkpoint(renamed)
    with pytest.raises(ConfigError, match="no such checkpoint"):
        step_of_checkpoint(path)


def test_latest_decides_when_a_kill_left_later_ones(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (5, 10, 15):
        folder.save(step, checkpoint_of(step))
    (tmp_path / "latest").write_text("step-00000010")
    assert folder.load_latest()[0].name == "step-00000010"
    (tmp_path / "step-00000010" / "state.json").unlink()
    assert folder.load_latest()[0].name == "step-00000005"
    (tmp_path / "step-00000005" / "state.json").unlink()
    assert folder.load_latest()[0].name == "step-00000015"


@pytest.mark.parametrize("content", ["", "step-7", "../../etc", "\xff" * 99])
def test_a_damaged_latest_means_the_newest(tmp_path: Path, content: str) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (5, 10):
        folder.save(step, checkpoint_of(step))
    (tmp_path / "latest").write_text(content)
    assert folder.load_latest()[0].name == "step-00000010"
    (tmp_path / "latest").unlink()
    assert folder.load_latest()[0].name == "step-00000010"


def test_a_disk_that_refuses_leaves_the_old_ones_and_no_rest(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the same calls fail."""
    folder = CheckpointFolder(tmp_path)
    folder.save(1, checkpoint_of(1))
    large = {"student": {"weight": torch.zeros(100_000)}, "optimizer": {}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match="student.safetensors"):
            folder.save(2, Checkpoint({}, large))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert folder.load_latest()[0].name == "step-00000001"


@pytest.mark.multiprocess
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for delay_seconds in (0.05, 0.11, 0.17, 0.23):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(CheckpointFolder(tmp_path).steps)
        time.sleep(delay_seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        path, loaded = CheckpointFolder(tmp_path).load_latest()
        assert path.name == f"step-{loaded.state['step']:08d}"
        expected = torch.full((200_000,), float(loaded.state["step"]))
        assert torch.equal(loaded.tensors["student"]["weight"], expected)
        CheckpointFolder(tmp_path).clear_leftovers()
        assert not list(tmp_path.glob(".tmp-*"))
        for entry in tmp_path.glob("step-*"):
            for file in entry.iterdir():
                file.unlink()
            entry.rmdir()
