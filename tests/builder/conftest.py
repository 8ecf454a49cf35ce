"""Lets the tests of this folder import what lies beside and above them; a place to build in."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS)]

if TYPE_CHECKING:
    from collections.abc import Callable

    from workshop import Workshop

    from sdxl_distill.demo.family import Family


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
    from photos import write_images
    from workshop import Workshop

    write_images(tmp_path / "images", 10)
    return Workshop(tmp_path, tiny_family)


@pytest.fixture(scope="session")
def built_template(tmp_path_factory: pytest.TempPathFactory, tiny_family: Family) -> Workshop:
    """Ten images, then three more; latents, text and two draws of one teacher are built."""
    from photos import write_images
    from workshop import Workshop

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
    from photos import write_photos
    from workshop import Workshop

    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "images")
    workshop = Workshop(root, tiny_family)
    workshop.build_latents()
    return workshop
