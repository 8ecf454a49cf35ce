"""`--dry-run` of both commands, in processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def builder_file(tiny_family, tmp_path) -> str:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        (images / f"{number}.jpg").touch()
    path = tmp_path / "builder.json"
    path.write_text(
        json.dumps(
            {
                "device": "cpu",
                "teacher": {"checkpoint_path": str(tiny_family.teachers[0]), "teacher_id": "a"},
                "data": {
                    "image_dir": str(images),
                    "bucket": {"resolutions": [[128, 64]]},
                    "latent_cache": {"cache_dir": str(tmp_path / "latents")},
                    "records_per_shard": 2,
                },
                "cache": {"output_dir": str(tmp_path / "predictions"), "draws": 3},
            }
        )
    )
    return str(path)


@pytest.fixture
def distill_file(tiny_family, tmp_path) -> str:
    path = tmp_path / "distill.json"
    path.write_text(
        json.dumps(
            {
                "device": "cpu",
                "run": {"name": "plan", "output_root": str(tmp_path)},
                "student": {"checkpoint_path": str(tiny_family.base)},
                "teachers": [{"teacher_id": "a", "cache_dir": str(tmp_path / "predictions")}],
                "training": {"num_steps": 3600, "batch_size": 2},
            }
        )
    )
    return str(path)


def test_a_builder_prints_what_it_will_take(builder_file):
    done = run("tools/build_shards.py", "--config", builder_file, "--dry-run", "--rate", "0.01")
    assert done.returncode == 0, done.stderr
    assert "forwards:  15 to do" in done.stdout
    assert re.search(r"shards: +9, of which 0 are there", done.stdout)
    assert "0.42 hours" in done.stdout  # 15 records / 0.01 per second
    assert "weights" in done.stdout and "activations" in done.stdout


def test_the_trainer_prints_what_it_will_take(distill_file):
    done = run("train.py", "--config", distill_file, "--dry-run", "--rate", "2")
    assert done.returncode == 0, done.stderr
    assert "7,200 records" in done.stdout
    assert "1.00 hours" in done.stdout
    assert "gradients" in done.stdout and "optimizer" in done.stdout


def test_nothing_is_written(distill_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    run("train.py", "--config", distill_file, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "2"], "add --dry-run"),
        (["--measure"], "add --dry-run"),
        (["--dry-run", "--rate", "0"], "a number above 0"),
    ],
)
def test_a_rate_that_makes_no_sense_is_a_configuration_error(distill_file, options, message):
    done = run("train.py", "--config", distill_file, *options)
    assert done.returncode == 2
    assert message in done.stderr
