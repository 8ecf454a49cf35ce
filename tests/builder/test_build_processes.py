"""Whole builds by many processes, also killed ones: what they publish is always the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.forked_command import ForkedCommand, launched
from support.patience import PATIENCE_SECONDS, wait_until
from support.ranks import free_port
from support.workshop import Workshop, identities, published_files, traces

ROOT = Path(__file__).parents[2]
TOOLS = {"build-latents": "build_latents.py", "build-shards": "build_shards.py"}
pytestmark = pytest.mark.multiprocess


@pytest.fixture
def fresh(built_template, tmp_path) -> Workshop:
    """The images of `built_template`, with nothing built of them."""
    (tmp_path / "images").symlink_to(built_template.images)
    return replace(built_template, root=tmp_path)


@pytest.fixture(scope="session")
def expected(built_template, tmp_path_factory) -> dict[str, bytes]:
    """What one process publishes in `fresh`: 13 images, one latents set, 2 draws of one teacher."""
    root = tmp_path_factory.mktemp("expected")
    (root / "images").symlink_to(built_template.images)
    workshop = replace(built_template, root=root)
    workshop.build_latents()
    workshop.build_shards("cache.draws=2")
    return everything(workshop)


def everything(workshop: Workshop) -> dict[str, bytes]:
    return {
        f"{directory.name}/{name}": content
        for directory in (workshop.latents, *workshop.predictions.glob("*"))
        for name, content in published_files(directory).items()
    }


def arguments(workshop: Workshop, command: str, *options: str) -> tuple[str, ...]:
    return (command, "--config", str(workshop.config_file), "--set", "cache.draws=2", *options)


def accelerate(workshop: Workshop, command: str, *options: str) -> subprocess.Popen[bytes]:
    """Start a tool as a user does."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options),
            *(str(ROOT / "tools" / TOOLS[command]), *arguments(workshop, command)[1:]),
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("num_processes", [2, 3])
def test_any_number_of_processes_publishes_the_same_bytes(fresh, expected, num_processes):
    for command in TOOLS:
        output = fresh.root / command
        with launched(num_processes, *arguments(fresh, command), output=output) as processes:
            assert [process.wait() for process in processes] == [0] * num_processes
    assert everything(fresh) == expected
    assert traces(fresh.root) == []


def test_two_launches_at_once_publish_the_same_bytes(fresh, expected):
    for command in TOOLS:
        options = arguments(fresh, command)
        with (
            launched(2, *options, output=fresh.root / f"{command}-a") as first,
            launched(2, *options, output=fresh.root / f"{command}-b") as second,
        ):
            assert [process.wait() for process in (*first, *second)] == [0] * 4
    assert everything(fresh) == expected
    assert traces(fresh.root) == []


@pytest.mark.slow
def test_accelerate_starts_two_processes_that_publish_the_same_bytes(fresh, expected):
    port = str(free_port())
    launch = accelerate(fresh, "build-latents", "--num_processes=2", "--main_process_port", port)
    assert launch.wait(PATIENCE_SECONDS) == 0
    latents = published_files(fresh.latents)
    assert {f"latents/{name}": content for name, content in latents.items()}.items() <= (
        expected.items()
    )
    assert traces(fresh.root) == []


@pytest.mark.slow
def test_accelerate_starts_two_nodes_that_publish_the_same_bytes(fresh, expected):
    fresh.build_latents()
    options = ("--num_processes=2", "--num_machines=2", "--main_process_ip=127.0.0.1")
    port = f"--main_process_port={free_port()}"
    nodes = [
        accelerate(fresh, "build-shards", *options, port, f"--machine_rank={rank}")
        for rank in range(2)
    ]
    assert [node.wait(PATIENCE_SECONDS) for node in nodes] == [0, 0]
    assert everything(fresh) == expected
    assert traces(fresh.root) == []


@pytest.mark.parametrize("command", TOOLS)
def test_a_builder_killed_again_and_again_loses_no_committed_shard(fresh, expected, command):
    random = np.random.default_rng(len(command))
    if command == "build-shards":
        fresh.build_latents()
    committed: dict[str, tuple[int, int]] = {}
    num_kills = 0
    while True:
        process = ForkedCommand(*arguments(fresh, command), output=fresh.root / f"log-{num_kills}")
        # At least one new shard each time: a busy machine would never come to an end otherwise.
        await_commits(process, fresh, len(committed) // 2 + random.integers(1, 4))
        was_killed = process.kill_after(random.uniform(0, 0.03))
        now = identities(
            index.with_suffix(suffix)
            for index in fresh.root.rglob("*.idx")
            for suffix in (".idx", ".tar")
        )
        assert committed.items() <= now.items()
        committed = now
        if not was_killed:
            break
        num_kills += 1
    assert process.wait() == 0, process.output
    assert num_kills > 0
    assert everything(fresh).items() <= expected.items()
    assert traces(fresh.root) == []


def await_commits(process: ForkedCommand, workshop: Workshop, num_shards: int) -> None:
    while process.is_running and len(list(workshop.root.rglob("*.idx"))) < num_shards:
        time.sleep(0.002)


def test_one_of_three_killed_is_made_up_for_by_the_others(fresh, expected):
    fresh.build_latents()
    options = arguments(fresh, "build-shards")
    with launched(3, *options, output=fresh.root / "launch") as processes:
        processes[1].kill_after(0.8)
        assert [process.wait() for process in (processes[0], processes[2])] == [0, 0]
    assert everything(fresh).items() >= expected.items()
    # It may have died in a set that the others were done with: the next run sweeps there.
    fresh.build_shards("cache.draws=2")
    assert everything(fresh) == expected
    assert traces(fresh.root) == []


def test_a_terminated_builder_leaves_nothing_unfinished_and_goes_on(fresh, expected):
    fresh.build_latents()
    options = arguments(fresh, "build-shards", "--set", "cache.batch_size=1")
    process = ForkedCommand(*options, output=fresh.root / "first")
    first = fresh.predictions / "teacher_a"
    wait_until(lambda: list(first.glob("*.idx")) or not process.is_running)
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.output
    assert traces(fresh.root) == []
    assert not (fresh.teacher / "manifest.json").exists()
    fresh.build_shards("cache.draws=2", "cache.batch_size=1")
    assert everything(fresh).keys() == expected.keys()
