"""Limits that belong together: what one lets through, the next must take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sdxl_distill import limits
from sdxl_distill.cli.main import main
from sdxl_distill.config.builder import BucketSection, BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import load_config, resolved_json
from sdxl_distill.core.bucket import Bucket
from sdxl_distill.errors import ConfigError
from sdxl_distill.shards.record import latents_schema
from sdxl_distill.shards.set_identity import SetIdentity, SetReference
from sdxl_distill.shards.shard_name import is_bucket_side


def _load(folder: Path, data: dict[str, Any], cache: dict[str, Any]) -> BuilderConfig:
    path = folder / "builder.json"
    tree = {
        "teacher": {"checkpoint_path": "t", "teacher_id": "t"},
        "data": {"image_dir": "i", **data},
        "cache": cache,
    }
    path.write_text(json.dumps(tree, separators=(",", ":")))
    return load_config(path, BuilderConfig)


def _resolutions(count: int) -> list[tuple[int, int]]:
    sides = range(limits.MAX_SIDE_PX, 0, -8)
    return [(width, height) for width in sides for height in sides][:count]


def test_the_largest_configuration_is_kept_and_fits_into_a_set_record(tmp_path: Path) -> None:
    resolutions = _resolutions(limits.MAX_BUCKETS)
    version = "\x01" * limits.MAX_VERSION_LENGTH
    config = _load(tmp_path, {"bucket": {"resolutions": resolutions}}, {"version": version})
    assert len(resolved_json(config)) < limits.MAX_CONFIG_BYTES
    place = SetReference("0" * 64, "../../../" + "/".join(["\x7f" * 255] * 13))
    identity = SetIdentity(
        kind="text",
        id="t" * 100,
        schema=latents_schema(),
        content={"buckets": sorted(list(bucket) for bucket in config.buckets), "version": version},
        latents=place,
    )
    assert len(identity.to_bytes()) < 0.5 * limits.MAX_SET_IDENTITY_BYTES


@pytest.mark.parametrize(
    ("data", "cache", "key"),
    [
        ({"bucket": {"resolutions": [[limits.MAX_SIDE_PX + 8, 64]]}}, {}, "resolutions"),
        ({"size": 4096 + 128}, {}, "size"),
        ({"records_per_shard": limits.MAX_RECORDS + 1}, {}, "records_per_shard"),
        ({}, {"draws": limits.MAX_DRAWS + 1}, "draws"),
        ({}, {"max_timestep": limits.MAX_TIMESTEPS + 1}, "max_timestep"),
        ({}, {"version": "v" * (limits.MAX_VERSION_LENGTH + 1)}, "version"),
    ],
)
def test_what_no_reader_takes_cannot_be_configured(tmp_path, data, cache, key) -> None:
    with pytest.raises(ConfigError, match=f"{key}"):
        _load(tmp_path, data, cache)


def test_every_bucket_that_can_be_configured_can_be_the_name_of_a_shard(tmp_path) -> None:
    for size in (128, 1024, 4096):
        buckets = _load(tmp_path, {"size": size}, {}).buckets
        assert all(is_bucket_side(side) for bucket in buckets for side in bucket)
    single = _load(tmp_path, {"size": 8192, "bucket": {"enabled": False}}, {})
    assert single.buckets == (Bucket(8192, 8192),)


def test_more_buckets_than_a_set_can_have_cannot_be_configured() -> None:
    with pytest.raises(ValidationError, match="at most 4096 items"):
        BucketSection(resolutions=_resolutions(limits.MAX_BUCKETS + 1))


def test_a_configuration_that_a_run_could_not_keep_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sdxl_distill.config.loader.MAX_CONFIG_BYTES", 4000)
    teachers = [{"teacher_id": f"t{number}"} for number in range(40)]
    path = tmp_path / "distill.json"
    tree = {"run": {"name": "r"}, "student": {"checkpoint_path": "s"}, "teachers": teachers}
    path.write_text(json.dumps(tree))
    assert path.stat().st_size < 4000
    with pytest.raises(ConfigError, match="with all its defaults"):
        load_config(path, DistillConfig)


@pytest.mark.parametrize("seed", ["-1", "1.5", "x"])
def test_a_seed_that_is_none_is_refused_by_the_command_line(capsys, seed) -> None:
    arguments = ["verify-shards", "--cache-dir", "x", "--recompute", "1", "--recompute-seed", seed]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--recompute-seed" in capsys.readouterr().err
