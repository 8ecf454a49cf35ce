"""Rank 0 decides and the others are told, through a real launcher's store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.patience import PATIENCE_SECONDS
from support.ranks import free_port

from sdxl_distill.builder.launch import Launch, refuse_in_job_array
from sdxl_distill.errors import ConfigError
from sdxl_distill.runtime.world import World

SCRIPT = """
import json, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed
from sdxl_distill.builder.launch import Launch
from sdxl_distill.errors import ConfigError, DistillError
from sdxl_distill.runtime.world import World
world = World.from_environment()
launch = Launch(world, timeout=timedelta(seconds=120))
def refuse():
    raise ConfigError("no images", expected="images", where="here", action="add some")
answers = [launch.decide("n", lambda: {"catalog": world.rank + 7})]
answers.append(launch.decide("none", lambda: None))
answers.append(str(launch.decide("place", Path, encode=str, decode=Path)))
try:
    launch.decide("refused", refuse)
except DistillError as error:
    answers.append([type(error).__name__, str(error)])
answers.append(torch.distributed.is_initialized())
place = Path(sys.argv[1])
place.joinpath(f"{world.rank}.json").write_text(json.dumps(answers))
while world.is_main and len(list(place.glob("*.json"))) < world.size:
    time.sleep(0.05)  # without an agent, the store lives in rank 0
"""
EXPECTED = (
    '[{"catalog": 7}, null, ".", ["ConfigError", '
    '"here: no images; expected images\\n  \\u2192 add some"], false]'
)


@pytest.mark.multiprocess
def test_all_ranks_of_accelerate_learn_what_rank_0_decided(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(tmp_path)], env=environment, check=True)
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == [EXPECTED] * 2


@pytest.mark.multiprocess
def test_ranks_without_an_agent_are_served_by_rank_0(tmp_path: Path) -> None:
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port},
        )
        for rank in (1, 0)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(2)] == [EXPECTED] * 2


def test_a_plain_process_decides_for_itself() -> None:
    decided = object()  # neither encoded nor decoded
    assert Launch(World(), {}).decide("n", lambda: decided) is decided


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_ARRAY_TASK_ID": "0"}, True),
        ({"PBS_ARRAY_INDEX": "1"}, True),
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4", "RANK": "0"}, False),
    ],
)
def test_a_task_of_a_job_array_knows_that_it_is_one(
    environment: dict[str, str], expected: bool
) -> None:
    assert Launch(World(), environment).is_one_of_many is expected


def test_only_a_restart_is_a_restart() -> None:
    counts = [{}, {"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_RESTART_COUNT": "2"}]
    assert [Launch(World(), count).is_restart for count in counts] == [False, False, True]


def test_a_job_array_may_not_withdraw() -> None:
    launch = Launch(World(), {"SLURM_ARRAY_TASK_ID": "3"})
    with pytest.raises(ConfigError, match="--withdraw-only"):
        refuse_in_job_array(launch, "toy")
    refuse_in_job_array(Launch(World(), {}), "toy")


def test_a_rank_does_not_wait_for_ever() -> None:
    script = SCRIPT.replace("seconds=120", "seconds=2")
    started = time.monotonic()
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", script, "/nowhere"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "StorageError" in done.stderr
    # Two seconds of waiting; the rest is the import of torch on a busy machine.
    assert time.monotonic() - started < PATIENCE_SECONDS
