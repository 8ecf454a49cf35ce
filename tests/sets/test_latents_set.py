from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.damages import DAMAGES
from support.oracles.draw import image_id_of
from support.oracles.pipeline import PipelineOracle, cropped_picture, upright_picture
from support.oracles.tars import read_set
from support.photos import BAD_SOURCES, CAPTIONS, damage_pixels, write_image, write_images
from support.workshop import BUCKETS, Workshop, identities, published_files, traces

from sdxl_distill.builder.withdrawal import withdraw_set
from sdxl_distill.catalog.image import BadImageError
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError, NumericalError
from sdxl_distill.storage.location import Location

pytestmark = pytest.mark.processors


@pytest.fixture(scope="module")
def records(photo_workshop):
    return read_set(photo_workshop.latents)


@pytest.fixture(scope="module")
def oracle(tiny_family):
    return PipelineOracle(tiny_family.base)


def test_every_picture_is_one_record_whose_key_is_the_hash_of_its_bytes(photo_workshop, records):
    sources = [path for path in photo_workshop.images.rglob("*.*") if path.suffix != ".txt"]
    good = [path for path in sources if not path.as_posix().endswith(BAD_SOURCES)]
    ids = {image_id_of(path.read_bytes()) for path in good}
    assert sorted(key.partition("_")[0] for key in records) == sorted(ids)
    assert len(ids) == len(good) - 1  # one picture is there twice


def test_latents_are_the_scaled_mean_of_the_pipelines_vae(photo_workshop, records, oracle):
    for key, record in records.items():
        latents = record.tensors["latents"]
        bucket = (8 * latents.shape[2], 8 * latents.shape[1])
        picture = upright_picture(photo_workshop.images / record.sidecar["source"])
        expected = oracle.latents(cropped_picture(picture, bucket)[0])
        assert key.endswith(f"_{bucket[0]}x{bucket[1]}")
        assert latents.dtype == torch.float16
        print(
            record.sidecar["source"], float((latents.float() - expected).norm() / expected.norm())
        )
        error = (latents.float() - expected).norm() / expected.norm()
        assert error < 5e-4, record.sidecar["source"]


def test_time_ids_are_those_of_the_pipeline(photo_workshop, records, oracle):
    for record in records.values():
        height, width = (8 * side for side in record.tensors["latents"].shape[1:])
        picture = upright_picture(photo_workshop.images / record.sidecar["source"])
        left, top = cropped_picture(picture, (width, height))[1]
        expected = oracle.time_ids((picture.height, picture.width), (top, left), (height, width))
        assert record.tensors["time_ids"].dtype == torch.int32
        assert record.tensors["time_ids"].tolist() == expected


def test_a_picture_goes_to_the_bucket_nearest_in_shape(photo_workshop, records):
    for record in records.values():
        height, width = (8 * side for side in record.tensors["latents"].shape[1:])
        picture = upright_picture(photo_workshop.images / record.sidecar["source"])

        def stretch(bucket, shape=picture.width / picture.height):
            return max(bucket[0] / bucket[1] / shape, shape * bucket[1] / bucket[0])

        assert (width, height) == min(BUCKETS, key=stretch)


def test_sidecars_hold_captions_and_sources(records):
    captions = {record.sidecar["source"]: record.sidecar["captions"] for record in records.values()}
    expected = {source: [caption.strip()] for source, caption in CAPTIONS.items()}
    expected |= {"things/print.jpg": [""], "small.png": [""]}
    expected.pop("people/astronaut_again.jpg")  # of two equal pictures the first one's counts
    assert captions == expected
    assert {record.sidecar["subset"] for record in records.values()} == {
        "",
        "nature",
        "people",
        "things",
    }


def test_the_report_names_what_was_left_out(photo_workshop):
    report = photo_workshop.build_latents().report
    assert (report.num_images, report.num_duplicates, report.num_new) == (12, 1, 0)
    assert {image.source for image in report.bad_images} == set(BAD_SOURCES) - {"things/cut.jpg"}
    assert report.num_empty_captions == 4
    assert report.differing_captions == ("people/astronaut.jpg",)


def test_a_picture_cut_in_its_pixels_is_listed_as_undecodable(photo_workshop):
    undecodable = photo_workshop.build_latents().built.manifest.undecodable
    cut = (photo_workshop.images / "things/cut.jpg").read_bytes()
    assert [key.partition("_")[0] for key in undecodable] == [image_id_of(cut)]


def test_without_buckets_all_pictures_become_squares(workshop: Workshop):
    workshop.build_latents("data.bucket.enabled=false", "data.size=64")
    assert {
        tuple(record.tensors["latents"].shape) for record in read_set(workshop.latents).values()
    } == {(4, 8, 8)}


def test_a_second_build_of_the_same_folder_gives_the_same_bytes(workshop, tmp_path):
    workshop.build_latents()
    workshop.build_latents(f'data.latent_cache.cache_dir="{tmp_path}/again"')
    assert published_files(workshop.latents) == published_files(tmp_path / "again")


def test_new_images_go_to_new_shards_and_the_others_stay(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.latents)
    committed = identities(workshop.latents.glob("latents-*"))
    write_images(workshop.images, 5, first=13)
    built = workshop.build_latents().built
    after = published_files(workshop.latents)
    assert committed.items() <= identities(workshop.latents.glob("latents-*")).items()
    assert built.manifest.catalog == 2
    assert built.manifest.num_records == 18
    assert len(after) > len(before)
    assert traces(workshop.root) == []


def test_nothing_new_leaves_every_file_alone(built_workshop):
    workshop = built_workshop
    before = identities(workshop.latents.rglob("*.*"))
    built = workshop.build_latents().built
    assert identities(workshop.latents.rglob("*.*")) == before
    assert built.summary.num_built == 0


def test_a_deleted_image_is_reported_and_its_record_stays(built_workshop):
    workshop = built_workshop
    (workshop.images / "003.png").unlink()
    built, report = workshop.build_latents()
    assert report.deleted == ("003.png",)
    assert built.manifest.num_records == 13


def test_a_changed_caption_is_refused(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.latents)
    (workshop.images / "003.txt").write_text("another caption")
    with pytest.raises(IncompatibleError, match=r"captions of 1 images.*003\.png"):
        workshop.build_latents()
    assert published_files(workshop.latents) == before


def test_a_changed_caption_can_be_kept_as_it_was(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.latents)
    (workshop.images / "003.txt").write_text("another caption")
    report = workshop.build_latents("data.on_changed_caption=keep").report
    assert report.changed_captions == ("003.png",)
    assert published_files(workshop.latents) == before


def test_a_rebuild_takes_changed_captions_and_leaves_no_trace_of_the_old_set(built_workshop):
    workshop = built_workshop
    (workshop.images / "003.txt").write_text("another caption")
    workshop.build_latents(rebuild=True)
    captions = {
        record.sidecar["source"]: record.sidecar["captions"]
        for record in read_set(workshop.latents).values()
    }
    assert captions["003.png"] == ["another caption"]
    assert traces(workshop.root) == []


def test_an_undecodable_image_leaves_its_shard_and_is_listed(workshop):
    damage_pixels(workshop.images / "000.png")
    manifest = workshop.build_latents().built.manifest
    assert manifest.num_records == 9
    assert len(manifest.undecodable) == 1


def test_an_undecodable_image_is_an_error_when_so_configured(workshop):
    damage_pixels(workshop.images / "000.png")
    with pytest.raises(BadImageError, match=r"000\.png"):
        workshop.build_latents("data.on_bad_image=error")
    assert not (workshop.latents / "manifest.json").exists()
    assert traces(workshop.root) == []


def test_a_shard_whose_images_all_fail_has_no_records(tmp_path, tiny_family):
    workshop = Workshop(tmp_path, tiny_family)
    write_image(workshop.images / "good.png", 0, 128, 128, "good")
    damage_pixels(write_image(workshop.images / "bad.png", 1, 160, 96, "bad"))
    manifest = workshop.build_latents().built.manifest
    assert {(entry.width, entry.num_records) for entry in manifest.shards} == {(128, 1), (160, 0)}


def test_a_missing_image_folder_is_named(workshop):
    shutil.rmtree(workshop.images)
    with pytest.raises(ConfigError, match=str(workshop.images)):
        workshop.build_latents()


def test_an_image_folder_without_images_is_named(workshop):
    shutil.rmtree(workshop.images)
    workshop.images.mkdir()
    with pytest.raises(ConfigError, match=str(workshop.images)):
        workshop.build_latents()


def test_a_wrong_image_folder_leaves_the_choice_of_buckets_free(workshop):
    with pytest.raises(ConfigError):
        workshop.build_latents(f'data.image_dir="{workshop.root}/nowhere"')
    workshop.build_latents("data.bucket.resolutions=[[64, 64]]")


def test_a_rebuild_from_a_wrong_image_folder_keeps_the_set_that_is_there(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.latents)
    with pytest.raises(ConfigError):
        workshop.build_latents(f'data.image_dir="{workshop.root}/nowhere"', rebuild=True)
    assert published_files(workshop.latents) == before


def test_the_scaling_factor_of_the_vae_is_applied(workshop, tiny_family, oracle):
    folder = shutil.copytree(tiny_family.base, workshop.root / "scaled")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    workshop.build_latents(f'model.id="{folder}"')
    for record in read_set(workshop.latents).values():
        picture = upright_picture(workshop.images / record.sidecar["source"])
        expected = 0.13025 * oracle.latents(picture)
        assert (record.tensors["latents"].float() - expected).norm() < 5e-4 * expected.norm()


def test_a_vae_with_means_of_latents_is_refused(workshop, tiny_family):
    folder = shutil.copytree(tiny_family.base, workshop.root / "other")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 4}))
    with pytest.raises(IncompatibleError, match="latents_mean"):
        workshop.build_latents(f'model.id="{folder}"')
    assert not workshop.latents.exists()


def test_latents_beyond_float16_stop_the_build(workshop, tiny_family):
    folder = shutil.copytree(tiny_family.base, workshop.root / "other")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 1e9}))
    with pytest.raises(NumericalError, match="float16"):
        workshop.build_latents(f'model.id="{folder}"')
    assert list(workshop.latents.glob("*.tar")) == []
    assert traces(workshop.root) == []


def test_a_link_to_another_disk_stays_a_link_when_the_set_is_rebuilt(workshop):
    (workshop.root / "elsewhere").mkdir()
    workshop.latents.symlink_to(workshop.root / "elsewhere")
    workshop.build_latents()
    before = published_files(workshop.latents)
    workshop.build_latents(rebuild=True)
    assert workshop.latents.is_symlink()
    assert published_files(workshop.latents) == before
    assert traces(workshop.root) == []


def test_what_a_killed_scan_left_in_the_catalog_goes_with_the_next(workshop):
    workshop.build_latents()
    (workshop.latents / "catalog" / f".tmp-{'0' * 32}-1").write_bytes(b"half a segment")
    workshop.build_latents()
    assert traces(workshop.root) == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_repair_gives_the_bytes_of_an_undamaged_build(built_workshop, damage):
    workshop = built_workshop
    before = published_files(workshop.latents)
    shards = sorted(workshop.latents.glob("*.tar"))
    kept = identities(shards[2:])
    damage(shards[0])
    workshop.build_latents(repair=True)
    assert published_files(workshop.latents) == before
    assert kept.items() <= identities(workshop.latents.glob("*.tar")).items()


def test_a_repair_replaces_a_damaged_set_record(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.latents)
    (workshop.latents / "set.json").write_bytes(b"{")
    with pytest.raises(CorruptError, match="--repair"):
        workshop.build_latents()
    workshop.build_latents(repair=True)
    assert published_files(workshop.latents) == before


def test_an_interrupted_repair_keeps_the_catalog_it_began_with(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.latents)
    withdraw_set(Location(workshop.latents), for_repair=True)  # and here the power fails
    workshop.build_latents(repair=True)
    assert published_files(workshop.latents) == before


def test_another_configuration_is_refused_with_the_fields_that_differ(built_workshop):
    workshop = built_workshop
    before = published_files(workshop.root)
    write_images(workshop.images, 1, first=13)
    with pytest.raises(IncompatibleError, match=r"content\.records_per_shard 3, not 4"):
        workshop.build_latents("data.records_per_shard=4")
    assert published_files(workshop.latents) == {
        name.removeprefix("latents/"): content
        for name, content in before.items()
        if name.startswith("latents/")
    }
    assert len(list((workshop.latents / "catalog").iterdir())) == 2
