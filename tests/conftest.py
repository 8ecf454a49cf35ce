"""Shared fixtures, and one compute thread per process unless OMP_NUM_THREADS says otherwise."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start take it over
# Threads that spin while they wait for one that does not run take seconds for a millisecond's work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A suite in the background of a script ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))  # what tests of several folders share

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from distill_cache import DistillCache

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
    from distill_cache import build_distill_cache

    return build_distill_cache(tmp_path_factory.mktemp("cache"), tiny_family)


@pytest.fixture(scope="session")
def trained_run(distill_cache: DistillCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps from that cache; what a test adds is its own affair."""
    from sdxl_distill.train.session import train_student

    folder = tmp_path_factory.mktemp("run")
    train_student(distill_cache.config(folder, "training.num_steps=4"))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for test in items:
            if test.get_closest_marker("gpu"):
                test.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
