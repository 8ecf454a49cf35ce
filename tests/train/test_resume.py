"""Killed and resumed is uninterrupted: the same bytes, on one, two and three processes."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.distill_cache import DistillCache
from support.ranks import Ranks, wait_until

from sdxl_distill.train.checkpoint import CheckpointFolder

NUM_STEPS = 12
FILES = ["ema.safetensors", "files.json", "optimizer.safetensors", "state.json",
         "student.safetensors"]  # fmt: skip
SETTINGS = [
    "training.batch_size=1",
    "training.gradient_accumulation_steps=2",
    f"training.num_steps={NUM_STEPS}",
]

Launch = Callable[..., Ranks]


@pytest.fixture(scope="module")
def launch(distill_cache: DistillCache) -> Launch:
    def start(folder: Path, world: int, *settings: str, resume: str | None = None) -> Ranks:
        folder.mkdir(exist_ok=True)
        overrides = [part for each in (*SETTINGS, *settings) for part in ("--set", each)]
        continued = () if resume is None else ("--resume", resume)
        return Ranks(world, distill_cache.config_file(folder), *overrides, *continued)

    return start


@pytest.fixture(scope="module")
def uninterrupted(
    launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[bytes]]:
    """The last checkpoint of a run that nothing happened to, per number of processes."""
    known: dict[int, list[bytes]] = {}

    def train(world: int) -> list[bytes]:
        if world not in known:
            folder = tmp_path_factory.mktemp(f"uninterrupted{world}")
            ranks = launch(folder, world)
            assert ranks.wait() == [0] * world, ranks.log.read_text()
            known[world] = last_checkpoint(folder)
        return known[world]

    return train


def checkpoints(folder: Path) -> CheckpointFolder:
    return CheckpointFolder(folder / "runs" / "run" / "checkpoints")


def last_checkpoint(folder: Path) -> list[bytes]:
    path = checkpoints(folder).path / f"step-{NUM_STEPS:08d}"
    assert sorted(file.name for file in path.iterdir()) == FILES
    return [(path / name).read_bytes() for name in FILES]


def resume_to_the_end(launch: Launch, folder: Path, world: int, reference: str = "latest") -> None:
    ranks = launch(folder, world, resume=reference)
    assert ranks.wait() == [0] * world, ranks.log.read_text()


def kill_after(ranks: Ranks, folder: Path, step: int, delay_seconds: float) -> None:
    """Kill some time after a checkpoint, but well before the end: a busy machine may oversleep."""

    def last_step() -> int:
        return max(checkpoints(folder).steps(), default=0)

    wait_until(lambda: last_step() >= step, ranks)
    moment = time.monotonic() + delay_seconds
    wait_until(lambda: time.monotonic() >= moment or last_step() >= NUM_STEPS - 4, ranks)
    ranks.kill()
    assert checkpoints(folder).steps()[-1] < NUM_STEPS, "it ended before it was killed"


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_and_resumed_is_uninterrupted(
    launch: Launch, uninterrupted: Callable[[int], list[bytes]], tmp_path: Path, world: int
) -> None:
    ranks = launch(tmp_path, world)
    kill_after(ranks, tmp_path, step=2, delay_seconds=0.11 * world)
    resume_to_the_end(launch, tmp_path, world)
    assert last_checkpoint(tmp_path) == uninterrupted(world)
    assert not list(checkpoints(tmp_path).path.glob(".tmp-*"))


@pytest.mark.multiprocess
def test_killed_while_it_writes_and_killed_again(
    launch: Launch, uninterrupted: Callable[[int], list[bytes]], tmp_path: Path
) -> None:
    ranks = launch(tmp_path, 1, "training.checkpoint_every=1")
    wait_until(
        lambda: (
            (steps := checkpoints(tmp_path).steps())
            and (_is_writing(tmp_path) or steps[-1] >= NUM_STEPS // 2)
        ),
        ranks,
    )
    ranks.kill()
    before = checkpoints(tmp_path).steps()[-1]
    assert before < NUM_STEPS, "it ended before it was killed"
    ranks = launch(tmp_path, 1, "training.checkpoint_every=1", resume="latest")
    kill_after(ranks, tmp_path, step=min(before + 2, NUM_STEPS - 2), delay_seconds=0.05)
    resume_to_the_end(launch, tmp_path, 1)
    assert last_checkpoint(tmp_path) == uninterrupted(1)


def _is_writing(folder: Path) -> bool:
    return any(checkpoints(folder).path.glob(".tmp-*/student.safetensors"))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "asked", "number"),
    [(1, [0], signal.SIGUSR1), (2, [1], signal.SIGTERM), (2, [0, 1], signal.SIGINT)],
)
def test_a_rank_that_is_asked_to_stop_has_all_save_at_the_next_step(
    launch: Launch,
    uninterrupted: Callable[[int], list[bytes]],
    tmp_path: Path,
    world: int,
    asked: list[int],
    number: int,
) -> None:
    ranks = launch(tmp_path, world, "training.checkpoint_every=1000", "training.log_every=1")
    wait_until(lambda: "images/s" in ranks.log.read_text(), ranks)
    ranks.signal(number, asked)
    assert ranks.wait() == [75] * world, ranks.log.read_text()
    (step,) = checkpoints(tmp_path).steps()
    assert 0 < step < NUM_STEPS
    assert f"asked to stop after step {step}; its checkpoint is saved" in ranks.log.read_text()
    resume_to_the_end(launch, tmp_path, world)
    assert last_checkpoint(tmp_path) == uninterrupted(world)


@pytest.mark.multiprocess
def test_a_path_and_a_damaged_latest_resume_from_an_older_checkpoint(
    launch: Launch, uninterrupted: Callable[[int], list[bytes]], tmp_path: Path
) -> None:
    ranks = launch(tmp_path, 1, "training.keep_checkpoints=5")
    assert ranks.wait() == [0]
    folder = checkpoints(tmp_path)
    assert folder.steps() == [4, 6, 8, 10, 12]

    older = shutil.copytree(folder.path / "step-00000004", tmp_path / "elsewhere")
    resume_to_the_end(launch, tmp_path, 1, str(older))
    assert folder.steps() == [10, 12]
    assert last_checkpoint(tmp_path) == uninterrupted(1)
    aside = [path.name for path in sorted((folder.path / "set-aside-1").iterdir())]
    assert aside == [f"step-{step:08d}" for step in (4, 6, 8, 10, 12)]
    assert f"set aside in {folder.path / 'set-aside-1'}" in (tmp_path / "distill.log").read_text()

    victim = folder.path / "step-00000012" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    resume_to_the_end(launch, tmp_path, 1)
    assert "falling back" in (tmp_path / "distill.log").read_text()
    assert last_checkpoint(tmp_path) == uninterrupted(1)


@pytest.mark.multiprocess
def test_all_ranks_fall_back_from_what_only_the_main_one_reads(
    launch: Launch, uninterrupted: Callable[[int], list[bytes]], tmp_path: Path
) -> None:
    ranks = launch(tmp_path, 2)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    victim = checkpoints(tmp_path).path / f"step-{NUM_STEPS:08d}" / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    resume_to_the_end(launch, tmp_path, 2)
    log = ranks.log.read_text()
    assert "falling back" in log
    assert "the main process found it damaged" in log
    assert last_checkpoint(tmp_path) == uninterrupted(2)


@pytest.mark.multiprocess
def test_what_the_main_rank_finds_in_a_checkpoint_ends_all(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    student = shutil.copytree(distill_cache.family.base, tmp_path / "student")
    victim = student / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-4:] = b"\x00\x00\x80\x7f"  # a float32 infinity
    victim.write_bytes(content)
    file = distill_cache.config_file(tmp_path)
    overrides = [f"student.checkpoint_path={student}", "training.batch_size=2"]
    ranks = Ranks(2, file, *(part for each in overrides for part in ("--set", each)))
    assert ranks.wait() == [3, 3], ranks.log.read_text()
    assert ranks.log.read_text().count("this one is broken") == 2
    assert "NaN" in ranks.log.read_text()


@pytest.mark.multiprocess
def test_ranks_that_see_different_checkpoints_are_refused(
    distill_cache: DistillCache, launch: Launch, tmp_path: Path
) -> None:
    """As on two nodes whose run folder is not shared."""
    assert launch(tmp_path, 1, "training.batch_size=2").wait() == [0]
    shutil.copytree(tmp_path / "runs", tmp_path / "others")
    shutil.rmtree(tmp_path / "others" / "run" / "checkpoints" / f"step-{NUM_STEPS:08d}")
    ranks = Ranks(
        2,
        distill_cache.config_file(tmp_path),
        *(part for each in SETTINGS for part in ("--set", each)),
        *("--resume", "latest"),
        own_arguments=[(), (f"--set=run.output_root={tmp_path / 'others'}",)],
    )
    assert ranks.wait() == [5, 5]
    assert "the ranks resumed steps [12, 10]" in ranks.log.read_text()
