"""The launch files, read by those who will: accelerate and bash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

ROOT = Path(__file__).parents[1]
ACCELERATE = sorted(ROOT.glob("launch/accelerate/*.yaml"))
SHELL = [*sorted(ROOT.glob("launch/slurm/*")), ROOT / ".ci/run"]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_the_configuration_and_leaves_precision_alone(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "no"
    assert config.num_processes >= config.num_machines


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_reads_the_script(path):
    subprocess.run(["bash", "-n", path], check=True)


def launched(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Run the Slurm script with commands in Slurm's place; return what the launcher was given."""
    commands = {
        "bin/scontrol": 'echo "node7"',
        "bin/srun": 'shift; export SLURM_NODEID=0; exec "$@"',
        ".venv/bin/accelerate": 'env; echo "ARGUMENTS=$*"',
    }
    for name, text in commands.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        **variables,
    }
    script = ["bash", ROOT / "launch/slurm/train.sbatch", "train.py", "--config", "c.json"]
    done = subprocess.run(
        script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize(
    ("variables", "cpus", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "64"}, "64", "8"),
        ({"SLURM_CPUS_PER_TASK": "64", "GPUS_PER_NODE": "4"}, "64", "16"),
        ({"SLURM_CPUS_PER_TASK": "4"}, "4", "1"),
        ({"SLURM_CPUS_PER_TASK": "64", "OMP_NUM_THREADS": "3"}, "64", "3"),
    ],
)
def test_slurms_processes_share_the_cores_of_their_node(tmp_path, variables, cpus, threads):
    given = launched(tmp_path, **variables)
    assert given["SRUN_CPUS_PER_TASK"] == cpus
    assert given["OMP_NUM_THREADS"] == threads


def test_slurm_starts_one_launcher_a_node_with_all_processes(tmp_path):
    arguments = launched(tmp_path, SLURM_CPUS_PER_TASK="64")["ARGUMENTS"]
    for part in ("--num_machines 2", "--num_processes 16", "--main_process_ip node7",
                 "train.py --config c.json"):  # fmt: skip
        assert part in arguments
