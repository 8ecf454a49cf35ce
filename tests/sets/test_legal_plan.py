"""Configurations whose sets no reader would accept are refused before anything is done."""

from __future__ import annotations

import re

import pytest

from sdxl_distill.builder.plan import PlannedShard
from sdxl_distill.catalog import scan
from sdxl_distill.catalog.segment import CatalogRow
from sdxl_distill.core.bucket import Bucket, cover_crop
from sdxl_distill.errors import ConfigError
from sdxl_distill.estimate.build import estimate_predictions
from sdxl_distill.limits import MAX_CAPTION_BYTES
from sdxl_distill.sets.legal_plan import (
    require_legal_config,
    require_legal_plan,
    require_legal_rows,
)
from sdxl_distill.shards.record import latents_schema, predictions_schema
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.verify.whole_set import verify_set

LARGE = ("data.bucket.resolutions=[[2048,2048]]", "data.records_per_shard=60000")


def _row(number: int, shard: int, caption: str) -> CatalogRow:
    bucket = Bucket(1024, 1024)
    crop = cover_crop(1024, 1024, bucket)
    return CatalogRow(
        f"{number:032x}", f"{number}.png", 1, 1, 1024, 1024, bucket, crop, (caption,), shard
    )


def test_shards_that_would_be_too_large_are_refused_before_the_scan(workshop, monkeypatch):
    monkeypatch.delattr(scan, "_find_candidates")
    with pytest.raises(ConfigError, match="set data.records_per_shard to at most 4") as caught:
        workshop.build_latents(*LARGE)
    assert caught.value.where == "data.records_per_shard"
    assert not workshop.latents.exists()


def test_the_teachers_shards_are_looked_at_when_latents_are_planned(workshop):
    override = "data.bucket.resolutions=[[1024,1024]]"
    fits_latents = (override, "data.records_per_shard=15000", "cache.layout=full")
    with pytest.raises(ConfigError, match="set teacher_a with 15,000 records"):
        workshop.build_latents(*fits_latents)
    assert not workshop.latents.exists()


@pytest.mark.parametrize("what", ["latents", "predictions"])
def test_a_dry_run_refuses_what_the_build_would_refuse(workshop, what):
    large = LARGE
    if what == "predictions":
        large = (LARGE[0], "data.records_per_shard=4000", "cache.dtype=fp32")
    with pytest.raises(ConfigError, match="records_per_shard"):
        estimate_predictions(workshop.config(*large))


def test_more_images_than_a_set_can_hold_are_refused_before_one_is_read(workshop, monkeypatch):
    monkeypatch.setattr("sdxl_distill.sets.legal_plan.MAX_SHARDS", 6)
    monkeypatch.delattr(scan, "_look")
    with pytest.raises(ConfigError, match="10 images; expected at most 9"):
        workshop.build_latents("cache.draws=2")


def test_captions_that_make_a_shard_too_large_are_refused_before_they_are_catalogued(monkeypatch):
    monkeypatch.setattr("sdxl_distill.shards.legal_set.MAX_SHARD_BYTES", 20 << 20)
    caption = "\x01" * MAX_CAPTION_BYTES
    rows = [_row(number, 0, caption) for number in range(4)]
    with pytest.raises(ConfigError, match="set data.records_per_shard to at most 3"):
        require_legal_rows(latents_schema(), 1, {}, rows)
    rows = [_row(number, number // 3, caption) for number in range(4)]
    require_legal_rows(latents_schema(), 1, {}, rows)


def test_the_shards_of_all_draws_and_of_earlier_catalogs_count(monkeypatch):
    monkeypatch.setattr("sdxl_distill.shards.legal_set.MAX_SHARDS", 1000)
    there = {Bucket(1024, 1024): 250}
    require_legal_rows(latents_schema(), 3, there, [_row(0, 250, "")])
    with pytest.raises(ConfigError, match="1,004 shards"):
        require_legal_rows(latents_schema(), 4, there, [_row(0, 250, "")])


def test_a_teacher_that_follows_larger_latents_is_refused_with_the_remedy():
    schema = predictions_schema("full", "F16", 4, 77, 2048, 1280)
    shard = PlannedShard(ShardName("a", 1024, 1024, 0), 8192, "0" * 64)
    with pytest.raises(ConfigError, match="at most 3692 and build the latents again") as caught:
        require_legal_plan("a", schema, [shard])
    assert "cache.layout: compact" in str(caught.value)


def test_a_caption_that_grows_sixfold_is_built_verified_and_encoded(workshop):
    for image in workshop.images.iterdir():
        image.with_suffix(".txt").write_text("\x01" * MAX_CAPTION_BYTES)
        break
    workshop.build_latents()
    assert verify_set(workshop.latents).findings == []
    with open_shard_set(workshop.latents) as latents:
        sizes = [latents.index(name).sidecar_sizes.max() for name in latents.manifest.names()]
    assert max(sizes) > 6 * MAX_CAPTION_BYTES


@pytest.mark.parametrize("layout", ["full", "compact"])
def test_the_value_that_is_named_works_for_all_sets_of_the_configuration(workshop, layout):
    def check(records_per_shard: int) -> None:
        place, count = f"cache.layout={layout}", f"data.records_per_shard={records_per_shard}"
        require_legal_config(workshop.config(LARGE[0], place, count), latents_schema())

    with pytest.raises(ConfigError) as caught:
        check(60_000)
    found = re.search(r"at most (\d+)", caught.value.action or "")
    assert found is not None
    most = int(found[1])
    check(most)
    with pytest.raises(ConfigError, match=f"to at most {most}"):
        check(most + 1)
