"""The launch files, read by those who will: accelerate and bash."""

from __future__ import annotations

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
