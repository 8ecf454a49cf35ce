"""The builders' commands as processes: exit codes, messages, and what they leave behind."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from support.forked_command import ForkedCommand, limit_file_size, obey_permissions
from support.photos import damage_pixels, write_images
from support.workshop import Workshop, published_files, traces

from sdxl_distill.cli.main import COMMANDS
from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.loader import load_config

ROOT = Path(__file__).parents[2]
TOOLS = sorted(ROOT.glob("tools/*.py"))
HELP_SECONDS = 0.5
pytestmark = pytest.mark.multiprocess


@pytest.fixture
def workshop(tmp_path, tiny_family) -> Workshop:
    write_images(tmp_path / "images", 6)
    return Workshop(tmp_path, tiny_family)


@pytest.fixture
def run(workshop, tmp_path):
    """Run a command to its end; return its exit code and what it printed."""

    def run(command, *overrides, options=(), limits=None):
        settings = [part for override in overrides for part in ("--set", override)]
        arguments = (command, "--config", str(workshop.config_file), *settings, *options)
        output = tmp_path / f"log-{time.monotonic_ns()}"
        process = ForkedCommand(*arguments, output=output, limits=limits)
        return process.wait(), process.output

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_in_half_a_second(command):
    program = f"from sdxl_distill.cli.main import main; main(['{command}', '--help'])"
    answer_at_once([sys.executable, "-c", program])


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_the_tools_help_answers_in_half_a_second(tool):
    answer_at_once([sys.executable, str(tool), "--help"])


def answer_at_once(command: list[str]) -> None:
    """Count processor time, and ask up to five times: the machine may be busy."""
    seconds: list[float] = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert answer.startswith("usage: ")
        if seconds[-1] < HELP_SECONDS:
            return
    raise AssertionError(seconds)


def test_a_build_ends_with_a_summary(workshop, run):
    code, output = run("build-latents")
    assert code == 0
    assert "images: 6 (6 new, 0 duplicates), 0 without caption" in output
    assert f"{workshop.latents}: 6 records in 4 shards" in output
    code, output = run("build-shards", "cache.draws=2")
    assert code == 0
    assert f"{workshop.teacher}: 12 records in 8 shards, 2 draws" in output
    assert "built here: 8 shards, 12 records" in output
    assert run("build-text")[0] == 0


@pytest.mark.parametrize("command", ["build-latents", "build-shards"])
def test_who_finds_everything_done_does_not_wait_for_diffusers(workshop, run, command):
    for each in ("build-latents", "build-shards"):
        assert run(each)[0] == 0
    program = (
        "import sys; from sdxl_distill.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'diffusers' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, command, "--config", str(workshop.config_file)]
    subprocess.run(arguments, check=True, capture_output=True)


def test_the_summary_names_images_that_were_left_out(workshop, run):
    (workshop.images / "text.jpg").write_text("no picture")
    damage_pixels(workshop.images / "001.png")
    output = run("build-latents")[1]
    assert "1 bad images left out:\n    text.jpg" in output
    assert "1 images that did not decode, left out" in output
    assert "001.png: cannot be decoded" in output


def test_print_config_prints_what_loads_again(workshop, run, tmp_path):
    code, output = run("build-shards", "cache.draws=3", options=("--print-config",))
    assert code == 0
    (tmp_path / "again.json").write_text(output)
    assert load_config(tmp_path / "again.json", BuilderConfig) == workshop.config("cache.draws=3")
    assert not workshop.predictions.exists()


def test_withdraw_only_sets_the_set_aside_once(workshop, run):
    workshop.build_latents()
    workshop.build_shards()
    before = published_files(workshop.teacher)
    first = run("build-shards", options=("--withdraw-only",))
    second = run("build-shards", options=("--withdraw-only",))
    assert (first[0], second[0]) == (0, 0)
    assert "set aside as" in first[1] and ".withdrawn-" in first[1]
    assert "set aside before" in second[1]
    assert not workshop.teacher.exists()
    assert run("build-shards", "cache.skip_existing=false")[0] == 0
    assert published_files(workshop.teacher) == before
    assert traces(workshop.root) == []


def test_a_repair_says_what_was_damaged_and_where_it_is_kept(workshop, run):
    workshop.build_latents()
    workshop.build_shards()
    code, output = run("build-shards", options=("--repair",))
    assert code == 0
    assert f"{workshop.teacher}: none of the 4 existing shards is damaged" in output
    damaged = min(workshop.teacher.glob("*.tar"))
    damage_pixels(damaged)
    code, output = run("build-shards", options=("--repair",))
    assert code == 0
    assert f"damaged: {damaged.stem}" in output
    assert "3 shards are good, 1 will be built again" in output
    (kept,) = workshop.predictions.glob(".*-repaired")
    assert kept.name in output


def test_withdraw_only_says_so_when_there_is_no_set(workshop, run):
    code, output = run("build-shards", options=("--withdraw-only",))
    assert code == 0
    assert f"there is no set at {workshop.teacher}" in output


def test_a_misspelt_key_exits_with_2(run):
    code, output = run("build-shards", "cache.drawz=2")
    assert code == 2
    assert "ConfigError" in output
    assert "draws" in output


def test_a_damaged_index_exits_with_3(workshop, run):
    workshop.build_latents()
    next(workshop.latents.glob("*.idx")).write_bytes(b"\0" * 64)
    assert run("build-text")[0] == 3


def test_another_configuration_exits_with_4(workshop, run):
    workshop.build_latents()
    workshop.build_shards()
    code, output = run("build-shards", "cache.base_seed=7")
    assert code == 4
    assert "noise.base_seed 42, not 7" in output


def test_a_broken_prediction_exits_with_6(workshop, run, tmp_path):
    workshop.build_latents()
    teacher = shutil.copytree(workshop.family.teachers[0], tmp_path / "teacher")
    weights = teacher / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"] *= 1e7
    save_file(tensors, weights)
    code, output = run("build-shards", f'teacher.checkpoint_path="{teacher}"')
    assert code == 6
    assert "timestep" in output


def test_a_folder_that_may_not_be_written_exits_with_5(workshop, run):
    workshop.build_latents()
    workshop.predictions.mkdir()
    workshop.predictions.chmod(0o555)
    code, output = run("build-shards", limits=obey_permissions)
    assert code == 5
    assert f"{workshop.predictions}" in output
    assert "let this user read and write" in output
    assert list(workshop.predictions.iterdir()) == []


def test_a_file_that_grows_too_large_exits_with_5_and_keeps_what_was_committed(workshop, run):
    workshop.build_latents()
    code, output = run("build-shards", limits=limit_file_size)
    assert code == 5
    assert "File too large" in output
    assert traces(workshop.root) == []
    assert run("build-shards")[0] == 0


def test_a_full_disk_exits_with_5_and_with_more_space_the_same_command_goes_on(
    workshop, run, small_disk, tmp_path
):
    workshop.build_latents()
    workshop.build_shards(f'cache.output_dir="{tmp_path}/large/predictions"')
    teacher = small_disk.place / "predictions" / workshop.teacher.name
    override = f'cache.output_dir="{small_disk.place}/predictions"'
    code, output = run("build-shards", override, limits=small_disk.limits)
    assert code == 5
    assert small_disk.reason in output
    assert not (teacher / "manifest.json").exists()
    assert traces(small_disk.place) == []
    small_disk.grow()
    assert run("build-shards", override)[0] == 0
    expected = published_files(tmp_path / "large/predictions" / workshop.teacher.name)
    assert published_files(teacher) == expected


class SmallDisk(NamedTuple):
    """A folder with room for some shards of the predictions set.

    Attributes:
        place: the folder.
        reason: what the operating system says when it is full.
        limits: that a process must take on itself.
        grow: makes room for all.
    """

    place: Path
    reason: str
    limits: Callable[[], None] | None
    grow: Callable[[], object]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[SmallDisk]:
    """A file system of its own; where none may be mounted, files may not grow large instead."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "none", str(place)]
    may_mount = (
        shutil.which("mount")
        and not subprocess.run(mount, check=False, capture_output=True).returncode
    )
    if not may_mount:
        yield SmallDisk(place, "File too large", limit_file_size, lambda: None)
        return
    remount = ["mount", "-o", "remount,size=4m", str(place)]
    yield SmallDisk(
        place, "No space left on device", None, partial(subprocess.run, remount, check=True)
    )
    subprocess.run(["umount", place], check=True)
