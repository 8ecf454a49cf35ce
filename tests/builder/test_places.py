"""The whole way from images to an exported student, in places that do not link."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.distill_cache import DistillCache
from support.forked_command import ForkedCommand, launched
from support.photos import damage_pixels
from support.places import Linkless, place_without_create_only_names, place_without_links
from support.workshop import Workshop, published_files, traces

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def linkless(tmp_path: Path) -> Iterator[Linkless]:
    with place_without_links(tmp_path) as place:
        yield place


@pytest.fixture
def nameless(tmp_path: Path) -> Iterator[Linkless]:
    with place_without_create_only_names(tmp_path) as place:
        yield place


class Run:
    """Runs commands in a place to their ends."""

    def __init__(self, place: Linkless, log: Path) -> None:
        self._place = place
        self._log = log
        self.num_runs = 0

    def __call__(self, *arguments: str) -> tuple[int, str]:
        self.num_runs += 1
        output = self._log / f"log-{self.num_runs}"
        process = ForkedCommand(*arguments, output=output, limits=self._place.limits)
        return process.wait(), process.output

    def succeeds(self, *arguments: str) -> str:
        code, output = self(*arguments)
        assert code == 0, output
        return output


def test_two_processes_build_in_a_place_without_links_what_one_builds_elsewhere(
    workshop: Workshop, linkless: Linkless, tmp_path: Path
) -> None:
    workshop.build_latents()
    workshop.build_shards()
    here = replace(workshop, root=linkless.path / "here")
    shutil.copytree(workshop.images, here.images, copy_function=shutil.copyfile)
    for command in ("build-latents", "build-shards"):
        arguments = (command, "--config", str(here.config_file))
        log = tmp_path / command
        with launched(2, *arguments, output=log, limits=linkless.limits) as processes:
            codes = [process.wait() for process in processes]
            assert codes == [0, 0], processes[0].output
    for built, expected in ((here.latents, workshop.latents), (here.teacher, workshop.teacher)):
        assert published_files(built) == published_files(expected)
    assert traces(here.root) == []


def test_one_exclusive_process_does_everything_in_a_place_without_create_only_names(
    workshop: Workshop, nameless: Linkless, tmp_path: Path
) -> None:
    here, run = replace(workshop, root=nameless.path), Run(nameless, tmp_path)
    shutil.copytree(workshop.images, here.images, copy_function=shutil.copyfile)
    config = ("--config", str(here.config_file))
    code, output = run("build-latents", *config)
    assert code == 5
    assert "cache.exclusive" in output
    builder = (*config, "--set", "cache.exclusive=true")
    run.succeeds("build-latents", *builder)
    run.succeeds("build-shards", *builder)
    before = published_files(here.teacher)
    run.succeeds("build-shards", *builder)
    assert published_files(here.teacher) == before
    damage_pixels(min(here.teacher.glob("*.tar")))
    assert "1 will be built again" in run.succeeds("build-shards", *builder, "--repair")
    assert published_files(here.teacher) == before
    loose, packed = str(here.root / "loose"), str(here.predictions / "packed")
    run.succeeds("unpack-shards", "--cache-dir", str(here.teacher), "--output", loose)
    run.succeeds(
        "pack-shards", "--input", loose, "--output", packed, "--latents", str(here.latents)
    )
    assert published_files(Path(packed)) == before
    for path in (str(here.teacher), packed):
        run.succeeds("verify-shards", "--cache-dir", path)
    assert traces(here.latents) == []


def test_a_student_is_trained_and_exported_in_a_place_without_create_only_names(
    distill_cache: DistillCache, nameless: Linkless, tmp_path: Path
) -> None:
    run = Run(nameless, tmp_path)
    config = str(distill_cache.config_file(nameless.path))
    run.succeeds("train", "--config", config, "--set", "training.num_steps=2")
    assert (nameless.path / "runs/run/export/model_index.json").exists()
    run.succeeds(
        *("train", "--config", config, "--resume", "latest", "--set", "training.num_steps=4")
    )
