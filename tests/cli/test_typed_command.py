"""What the user typed, as far as the system can tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_distill.cli.typed_command import as_text, typed_command, with_resume

SCRIPT = """
import sys
from sdxl_distill.cli.typed_command import as_text, typed_command
print(as_text(typed_command("train", sys.argv[1:])))
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, *sys.argv[2:]], check=True)
"""


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, content in (("train.py", SCRIPT), ("launcher.py", LAUNCHER)):
        (tmp_path / name).write_text(content)
    for variable in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.check_output(command, text=True, cwd=tmp_path).strip()

    return run


def test_a_script_is_named_as_it_was_started(printed) -> None:
    typed = printed("train.py", "--config", "a b.json")
    assert typed == f"{sys.executable} train.py --config 'a b.json'"


def test_a_launcher_is_named_too(printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ("launcher.py", "launch", "train.py", "--config", "c.json")
    assert printed(*words) == f"ACCELERATE_USE_CPU=true {sys.executable} {' '.join(words)}"


def test_arguments_that_were_not_typed_give_the_command_itself() -> None:
    assert typed_command("train", ["--config", "c"]) == ["sdxl-distill", "train", "--config", "c"]


@pytest.mark.parametrize("resume", [[], ["--resume", "x"], ["--resume=x"], ["--res", "latest"]])
def test_the_continuation_resumes_the_latest_once(resume: list[str]) -> None:
    typed = ["python", "train.py", *resume, "--config", "c.json", "--set", "a=--resume"]
    expected = ["python", "train.py", "--config", "c.json", "--set", "a=--resume"]
    assert with_resume(typed) == [*expected, "--resume", "latest"]


def test_a_value_with_a_blank_is_quoted_and_an_assignment_stays_one() -> None:
    assert as_text(["OMP_NUM_THREADS=1", "a", "b c"]) == "OMP_NUM_THREADS=1 a 'b c'"
