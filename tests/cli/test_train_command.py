"""`train` and `export-student` as their users start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support import patience
from support.distill_cache import DistillCache
from support.patience import PATIENCE_SECONDS
from support.ranks import Ranks, free_port, wait_until as wait_for

from sdxl_distill.cli.main import main
from sdxl_distill.train.checkpoint import CheckpointFolder

ROOT = Path(__file__).parents[2]
PLAIN = (sys.executable, str(ROOT / "train.py"))


def launched(num_processes: int, *options: str) -> tuple[str, ...]:
    """The beginning of a command line that starts train.py on CPUs."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu")
    rest = ("--mixed_precision", "no", "--dynamo_backend", "no", *options)
    return (*launcher, "--num_processes", str(num_processes), *rest, str(ROOT / "train.py"))


def on_a_free_port() -> tuple[str, str]:
    return "--main_process_port", str(free_port())


def start(command: tuple[str, ...], log: Path, *arguments: str) -> psutil.Popen:
    with log.open("w") as file:
        return psutil.Popen(
            [*command, *arguments],
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def checkpoints(folder: Path) -> CheckpointFolder:
    return CheckpointFolder(folder / "runs" / "run" / "checkpoints")


def last_checkpoint(folder: Path) -> dict[str, bytes]:
    path = checkpoints(folder).path / f"step-{checkpoints(folder).steps()[-1]:08d}"
    return {file.name: file.read_bytes() for file in path.iterdir()}


def wait_until(condition: Callable[[], object], process: psutil.Popen, log: Path) -> None:
    def holds() -> bool:
        alive = process.poll() is None
        held = bool(condition())
        assert held or alive, log.read_text()
        return held

    patience.wait_until(holds)


def test_it_trains_exports_and_says_where(
    distill_cache: DistillCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(distill_cache.config_file(tmp_path))
    assert main(["train", "--config", config, "--set", "training.num_steps=2"]) == 0
    printed = capsys.readouterr().out
    export = tmp_path / "runs" / "run" / "export"
    assert "run: 2 steps" in printed
    assert f"exported to {export}" in printed
    assert (export / "model_index.json").is_file()

    assert main(["export-student", "--config", config]) == 2
    other = str(tmp_path / "raw")
    raw = ["--weights", "raw", "--output", other, "--set", "export.dtype=fp32"]
    assert main(["export-student", "--config", config, *raw]) == 0
    assert f"exported to {other}" in capsys.readouterr().out
    assert main(["export-student", "--config", config, "--overwrite"]) == 0


def test_every_branch_of_errors_has_its_exit_code(
    distill_cache: DistillCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(*overrides: str, resume: str | None = None) -> int:
        options = [part for each in overrides for part in ("--set", each)]
        continued = [] if resume is None else ["--resume", resume]
        config = str(distill_cache.config_file(tmp_path))
        return main(["train", "--config", config, "--no-export", *options, *continued])

    assert code("training.lr=3e38", "training.num_steps=9", "training.checkpoint_every=1") == 6
    assert "NumericalError" in capsys.readouterr().err
    assert code("run.name=b", "training.num_steps=1") == 0
    assert code("run.name=b") == 2
    assert code("run.name=b", "training.seed=1", resume="latest") == 4
    assert "config.training.seed was 42 and is now 1" in capsys.readouterr().err
    for path in (tmp_path / "runs" / "b" / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    assert code("run.name=b", resume="latest") == 3
    (tmp_path / "file").write_text("")
    assert code("run.name=c", f"training.tensorboard.base_dir={tmp_path / 'file'}") == 5
    assert code("teachers.1.teacher_id=ann") == 2
    assert "teachers[1].teacher_id" in capsys.readouterr().err


def test_the_resolved_configuration_is_printed(
    distill_cache: DistillCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(distill_cache.config_file(tmp_path))
    assert main(["train", "--config", config, "--print-config", "--set", "training.lr=7e-4"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["training"]["lr"] == 7e-4
    assert resolved["training"]["loss_type"] == "mse"
    assert not (tmp_path / "runs").exists()


@pytest.mark.multiprocess
def test_a_plain_process_that_is_asked_to_stop_saves_and_exits_with_75(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config, log = distill_cache.config_file(tmp_path), tmp_path / "log"
    endless = ("--set", "training.num_steps=100000", "--set", "training.checkpoint_every=100000")
    process = start(PLAIN, log, "--config", str(config), *endless, "--set", "training.log_every=1")
    wait_until(lambda: "images/s" in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 75
    (step,) = checkpoints(tmp_path).steps()
    assert f"asked to stop after step {step}; its checkpoint is saved" in log.read_text()
    assert "--resume latest" in log.read_text()


@pytest.mark.multiprocess
def test_ctrl_c_saves_and_prints_the_command_that_goes_on(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config, log = distill_cache.config_file(tmp_path), tmp_path / "log"
    endless = ("--set", "training.num_steps=100000", "--set", "training.checkpoint_every=100000")
    process = start(PLAIN, log, "--config", str(config), *endless, "--no-export")
    wait_until(lambda: "0/100000" in log.read_text(), process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 75
    (step,) = checkpoints(tmp_path).steps()
    command = log.read_text().partition(f"after step {step}; its checkpoint is saved\n  → ")[2]
    shorter = command.strip().replace("num_steps=100000", f"num_steps={step + 1}")
    # Given to a shell as a user types it: it may begin with variables.
    done = subprocess.run(["sh", "-c", shorter], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"run: {step + 1} steps" in done.stdout


@pytest.mark.multiprocess
def test_a_second_ctrl_c_ends_at_once_and_says_what_is_kept(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = distill_cache.config_file(tmp_path)
    run = Ranks(1, config, "--set", "training.gradient_accumulation_steps=1000")
    wait_for(lambda: "0/6" in run.log.read_text(), run)
    run.signal(signal.SIGINT)
    wait_for(lambda: "asked to stop: this step is finished" in run.log.read_text(), run)
    time.sleep(0.6)  # one press may come twice
    run.signal(signal.SIGINT)
    assert run.wait() == [130]
    assert "interrupted, and not saved; there is no checkpoint" in run.log.read_text()
    assert "--resume" not in run.log.read_text()


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_ends_it_and_says_that_nothing_was_done(
    distill_cache: DistillCache, tmp_path: Path, number: signal.Signals
) -> None:
    config = distill_cache.config_file(tmp_path)
    run = Ranks(1, config)
    wait_for(lambda: "run folder" in run.log.read_text(), run)
    run.signal(number)
    assert run.wait() == [75]
    assert "asked to stop before it took a step; there is no checkpoint" in run.log.read_text()
    assert run.log.read_text().endswith(f"→ sdxl-distill train --config {config} --no-export\n")
    assert not checkpoints(tmp_path).steps()
    assert not list((tmp_path / "runs" / "run").glob("lock-*"))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ctrl_c_at_the_launcher_has_all_ranks_save(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config, log = distill_cache.config_file(tmp_path), tmp_path / "log"
    endless = ("--set=training.num_steps=100000", "--set=training.checkpoint_every=100000")
    settings = ("--set=training.batch_size=2", *endless)
    launcher = start(launched(2, *on_a_free_port()), log, "--config", str(config), *settings)
    wait_until(lambda: "0/100000" in log.read_text(), launcher, log)
    launcher.send_signal(signal.SIGINT)
    launcher.wait(PATIENCE_SECONDS)
    (step,) = checkpoints(tmp_path).steps()
    assert f"asked to stop after step {step}; its checkpoint is saved" in log.read_text()
    typed = "-m accelerate.commands.launch --multi_gpu --num_processes 2"
    assert typed in log.read_text()
    assert f"--config {config} {' '.join(settings)} --resume latest" in log.read_text()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_along_and_resumes(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    settings = ("--set=training.batch_size=2", "--set=training.num_steps=16")
    whole = Ranks(2, distill_cache.config_file(tmp_path / "whole"), *settings)

    config, log = distill_cache.config_file(tmp_path / "killed"), tmp_path / "log"
    arguments = ("--config", str(config), "--no-export", *settings, "--resume", "latest")
    launcher = start(launched(2, *on_a_free_port()), log, *arguments)
    wait_until(lambda: checkpoints(tmp_path / "killed").steps(), launcher, log)
    ranks = launcher.children(recursive=True)
    assert len(ranks) >= 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
    assert not alive
    assert checkpoints(tmp_path / "killed").steps()[-1] < 16

    launcher = start(launched(2, *on_a_free_port()), log, *arguments)
    assert launcher.wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert whole.wait() == [0, 0]
    assert last_checkpoint(tmp_path / "killed") == last_checkpoint(tmp_path / "whole")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_nodes_are_two_processes(distill_cache: DistillCache, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "nodes").mkdir()
    settings = ("--set=training.batch_size=2", "--set=training.num_steps=3")
    node = Ranks(2, distill_cache.config_file(tmp_path / "node"), *settings)
    config, port = distill_cache.config_file(tmp_path / "nodes"), on_a_free_port()
    address = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", *port)
    launchers = [
        start(
            launched(2, *address, "--machine_rank", str(number)),
            tmp_path / f"log{number}",
            *("--config", str(config), "--no-export", *settings),
        )
        for number in range(2)
    ]
    for number, launcher in enumerate(launchers):
        assert launcher.wait(PATIENCE_SECONDS) == 0, (tmp_path / f"log{number}").read_text()
    assert node.wait() == [0, 0]
    assert last_checkpoint(tmp_path / "nodes") == last_checkpoint(tmp_path / "node")


@pytest.mark.multiprocess
def test_ctrl_c_saves_also_when_it_ended_the_reader_of_the_log(
    distill_cache: DistillCache, tmp_path: Path
) -> None:
    config = str(distill_cache.config_file(tmp_path))
    endless = ("training.num_steps=100000", "training.checkpoint_every=100000")
    options = [word for each in (*endless, "training.log_every=1") for word in ("--set", each)]
    process = psutil.Popen(
        [*PLAIN, "--config", config, *options],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while b"images/s" not in os.read(process.stdout.fileno(), 65_536):
        pass
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 75
    assert len(checkpoints(tmp_path).steps()) == 1
