"""Shared fixtures, and one compute thread per process unless OMP_NUM_THREADS says otherwise."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start take it over
# Threads that spin while they wait for one that does not run take seconds for a millisecond's work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test reads or writes what the user's commands remember.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sdxl-distill-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A suite in the background of a script ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))  # where `support` lies

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.distill_cache import DistillCache
    from support.verified_sets import VerifiedSets
    from support.workshop import Workshop

    from sdxl_distill.demo.family import Family

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# hypothesis fails an example that takes 200 ms, as any may on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Complete SDXL folders of random weights, a base and three teachers; read only."""
    from sdxl_distill.demo.family import build_untrained_family

    return build_untrained_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def distill_cache(tmp_path_factory: pytest.TempPathFactory, tiny_family: Family) -> DistillCache:
    """Complete sets of two teachers in two draws, by the real builders; read only."""
    from support.distill_cache import build_distill_cache

    return build_distill_cache(tmp_path_factory.mktemp("cache"), tiny_family)


@pytest.fixture(scope="session")
def trained_run(distill_cache: DistillCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps from that cache; what a test adds is its own affair."""
    from sdxl_distill.train.session import train_student

    folder = tmp_path_factory.mktemp("run")
    train_student(distill_cache.config(folder, "training.num_steps=4"))
    return folder


@pytest.fixture
def make_family(tmp_path: Path) -> Callable[..., Family]:
    """Writes a family of one's own, with the options of `build_untrained_family`."""
    from sdxl_distill.demo.family import build_untrained_family

    def make(**options: Any) -> Family:
        return build_untrained_family(tmp_path / f"family-{uuid4().hex}", **options)

    return make


@pytest.fixture
def workshop(tmp_path: Path, tiny_family: Family) -> Workshop:
    """Ten random images in four buckets, 3 to a shard, nothing built yet."""
    from support.photos import write_images
    from support.workshop import Workshop

    write_images(tmp_path / "images", 10)
    return Workshop(tmp_path, tiny_family)


@pytest.fixture(scope="session")
def built_template(tmp_path_factory: pytest.TempPathFactory, tiny_family: Family) -> Workshop:
    """Ten images, then three more; latents, text and two draws of one teacher are built."""
    from support.photos import write_images
    from support.workshop import Workshop

    root = tmp_path_factory.mktemp("built")
    workshop = Workshop(root, tiny_family)
    write_images(workshop.images, 10)
    workshop.build_latents()
    write_images(workshop.images, 3, first=10)
    workshop.build_latents()
    workshop.build_shards("cache.draws=2")
    return workshop


@pytest.fixture
def built_workshop(built_template: Workshop, tmp_path: Path) -> Workshop:
    """A copy of `built_template`, to be damaged and built on."""
    without_places = shutil.ignore_patterns("builder.json")
    shutil.copytree(built_template.root, tmp_path, ignore=without_places, dirs_exist_ok=True)
    return replace(built_template, root=tmp_path)


@pytest.fixture(scope="session")
def photo_workshop(tmp_path_factory: pytest.TempPathFactory, tiny_family: Family) -> Workshop:
    """Real photos in every format, with the latents set built; nothing may change what is there."""
    from support.photos import write_photos
    from support.workshop import Workshop

    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "images")
    workshop = Workshop(root, tiny_family)
    workshop.build_latents()
    return workshop


@pytest.fixture
def valid_sets(tmp_path: Path) -> VerifiedSets:
    """A cache folder in which a test builds sets that are valid in every value."""
    from support.verified_sets import VerifiedSets

    return VerifiedSets(tmp_path, {(64, 64, 0): 4, (64, 64, 1): 2, (64, 128, 0): 2})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for test in items:
            if test.get_closest_marker("gpu"):
                test.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
