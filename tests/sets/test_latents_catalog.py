from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from support.damages import flip_a_byte_of_the_tar
from support.earlier_version import without_sources
from support.oracles.tars import read_set
from support.photos import damage_pixels, write_image, write_images
from support.workshop import Workshop, identities, published_files

from sdxl_distill.catalog.catalog import Catalog
from sdxl_distill.catalog.segment import SegmentHeader, encode_segment, segment_name
from sdxl_distill.demo.family import Family
from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.loose.pack import pack_set
from sdxl_distill.loose.unpack import unpack_set
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.storage.fsio import Directory
from sdxl_distill.verify.whole_set import verify_set


def segments(workshop):
    return sorted((workshop.latents / "catalog").glob("*.parquet"))


def manifest_of(workshop):
    with open_shard_set(workshop.latents) as shard_set:
        return shard_set.manifest


def refused(workshop, match, **options):
    before = published_files(workshop.latents)
    with pytest.raises(IncompatibleError, match=match) as caught:
        workshop.build_latents(**options)
    assert "--rebuild" in str(caught.value)
    assert published_files(workshop.latents) == before


@pytest.fixture
def earlier(built_workshop):
    """A set that an earlier version built, with its predictions made of it."""
    without_sources(built_workshop.latents)
    shutil.rmtree(built_workshop.predictions)
    built_workshop.build_shards()
    return built_workshop


@pytest.mark.parametrize("repair", [False, True])
def test_a_set_that_lost_its_catalog_is_refused_before_any_work(built_workshop, repair):
    shutil.rmtree(built_workshop.latents / "catalog")
    write_images(built_workshop.images, 6, first=13)
    refused(built_workshop, "catalog is missing, but there are shards of catalog 1", repair=repair)


@pytest.mark.parametrize("repair", [False, True])
def test_a_catalog_shorter_than_its_set_is_refused(built_workshop, repair):
    segments(built_workshop)[-1].unlink()
    refused(built_workshop, "catalog ends with segment 0", repair=repair)


@pytest.mark.parametrize("repair", [False, True])
def test_shards_that_the_catalog_does_not_know_are_refused_without_a_manifest_too(
    built_workshop, repair
):
    (built_workshop.latents / "manifest.json").unlink()
    segments(built_workshop)[-1].unlink()
    refused(built_workshop, "not those of 3 existing shards", repair=repair)


def test_a_catalog_that_was_made_again_with_other_images_is_refused(workshop, tiny_family):
    other = Workshop(workshop.root / "other", tiny_family)
    write_images(other.images, 12)
    other.build_latents()
    workshop.build_latents()
    shutil.rmtree(workshop.latents / "catalog")
    shutil.copytree(other.latents / "catalog", workshop.latents / "catalog")
    refused(workshop, "images that the catalog does not plan for this shard")
    assert any(
        "does not plan for this shard" in finding.error.found
        for finding in verify_set(workshop.latents, quick=True).findings
    )


def test_a_rebuild_begins_again_without_the_lost_catalog(built_workshop):
    shutil.rmtree(built_workshop.latents / "catalog")
    manifest = built_workshop.build_latents(rebuild=True).built.manifest
    assert (manifest.num_records, manifest.undecodable) == (13, ())


def test_every_shard_names_the_digest_of_its_planned_ids_also_of_those_left_out(workshop):
    damage_pixels(workshop.images / "000.png")
    whole = workshop.build_latents().built.manifest
    names = [entry.source_sha256 for entry in whole.shards]
    assert all(names) and len(set(names)) == len(names)
    differing = [entry for entry in whole.shards if entry.source_sha256 != entry.keys_digest]
    assert len(differing) == len(whole.undecodable) == 1


@pytest.fixture
def other(workshop: Workshop, tiny_family: Family) -> Workshop:
    """A set of other images, next to one whose manifest is gone."""
    other = Workshop(workshop.root / "other", tiny_family)
    write_images(other.images, 6)
    other.build_latents()
    workshop.build_latents()
    (workshop.latents / "manifest.json").unlink()
    return other


def test_a_tar_that_was_planned_for_other_images_is_not_adopted(workshop, other):
    name = next(path.name for path in other.latents.glob("*.tar"))
    (workshop.latents / name).with_suffix(".idx").unlink()
    shutil.copy(other.latents / name, workshop.latents / name)
    with pytest.raises(CorruptError, match="--repair"):
        workshop.build_latents()
    workshop.build_latents(repair=True)
    assert len(read_set(workshop.latents)) == 10


def test_a_shard_that_was_planned_for_other_images_is_told_from_a_damaged_one(workshop, other):
    name = next(path.stem for path in other.latents.glob("*.tar"))
    for suffix in (".tar", ".idx"):
        shutil.copy(other.latents / (name + suffix), workshop.latents / (name + suffix))
    with pytest.raises(IncompatibleError, match="planned for other images"):
        workshop.build_latents()
    workshop.build_latents(repair=True)
    assert verify_set(workshop.latents).findings == []


def test_a_set_of_an_earlier_version_is_valid_and_grows_without_a_change_to_its_shards(earlier):
    assert verify_set(earlier.latents).findings == []
    committed = identities(earlier.latents.glob("latents-*"))
    predictions = identities(earlier.teacher.glob("*.tar"))
    write_images(earlier.images, 5, first=13)
    manifest = earlier.build_latents().built.manifest
    assert manifest.num_records == 18
    assert committed.items() <= identities(earlier.latents.glob("latents-*")).items()
    assert {entry.source_sha256 is None for entry in manifest.shards} == {True, False}
    assert verify_set(earlier.latents).findings == []
    built = earlier.build_shards()
    assert predictions.items() <= identities(earlier.teacher.glob("*.tar")).items()
    assert built.predictions.manifest.num_records == 18


def test_what_did_not_decode_in_an_earlier_version_is_known_from_its_manifest(workshop):
    damage_pixels(workshop.images / "000.png")
    left_out = workshop.build_latents().built.manifest.undecodable
    without_sources(workshop.latents)
    write_images(workshop.images, 3, first=10)
    manifest = workshop.build_latents().built.manifest
    assert (manifest.num_records, manifest.undecodable) == (12, left_out)
    assert verify_set(workshop.latents).findings == []


def test_an_image_missing_in_a_shard_of_an_earlier_version_is_no_image_that_did_not_decode(
    workshop,
):
    damage_pixels(workshop.images / "000.png")
    workshop.build_latents()
    without_sources(workshop.latents)
    with open_shard_set(workshop.latents) as shard_set:
        forgetful = replace(shard_set.manifest, undecodable=())
    (workshop.latents / "manifest.json").write_bytes(forgetful.to_bytes())
    refused(workshop, "not all of those that it plans")


def test_an_earlier_version_that_lost_its_manifest_keeps_its_shards(earlier):
    before = published_files(earlier.latents)
    (earlier.latents / "manifest.json").unlink()
    earlier.build_latents()
    assert published_files(earlier.latents) == before


def test_a_repair_of_an_earlier_version_gives_the_bytes_that_predictions_were_made_of(earlier):
    before = published_files(earlier.latents)
    flip_a_byte_of_the_tar(min(earlier.latents.glob("*.tar")))
    earlier.build_latents(repair=True)
    assert published_files(earlier.latents) == before


def test_a_repair_keeps_an_earlier_version_whose_manifest_is_damaged(earlier):
    before = published_files(earlier.latents)
    (earlier.latents / "manifest.json").write_bytes(b"{")
    earlier.build_latents(repair=True)
    assert published_files(earlier.latents) == before


def faults(workshop, **options):
    return [str(finding) for finding in verify_set(workshop.latents, **options).findings]


def test_no_flipped_byte_of_a_catalog_escapes_the_verifier(workshop):
    workshop.build_latents()
    (segment,) = segments(workshop)
    content = segment.read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        segment.write_bytes(damaged)
        assert any("catalog-000000.parquet" in fault for fault in faults(workshop, quick=True))
    segment.write_bytes(content)
    assert faults(workshop) == []


def test_the_verifier_misses_a_catalog_that_is_not_there(built_workshop):
    segments(built_workshop)[0].unlink()
    assert any("there is no such catalog segment" in fault for fault in faults(built_workshop))
    shutil.rmtree(built_workshop.latents / "catalog")
    (fault,) = faults(built_workshop)
    assert "catalog: is missing" in fault and "back from a copy" in fault


def test_the_verifier_names_a_shard_that_a_later_segment_plans_again(built_workshop):
    with Directory(built_workshop.latents / "catalog") as folder:
        catalog = Catalog.load(folder)
        rows = catalog.rows(catalog.shards[0])
        header = SegmentHeader(catalog.n + 1, catalog.sha256, 1, len(rows))
        folder.publish_bytes(segment_name(header.n), encode_segment(header, rows))
    assert any("shard 0 of" in fault and "comes twice" in fault for fault in faults(built_workshop))


def test_the_verifier_names_what_does_not_belong_into_the_catalogs_folder(built_workshop):
    (built_workshop.latents / "catalog" / "notes.txt").write_text("mine")
    (fault,) = faults(built_workshop)
    assert "'notes.txt', which is not a segment" in fault


def test_a_catalog_that_grew_since_is_no_fault_of_the_set(workshop, tiny_family):
    grown = Workshop(workshop.root / "grown", tiny_family)
    shutil.copytree(workshop.images, grown.images)
    workshop.build_latents()
    grown.build_latents()
    write_images(grown.images, 5, first=10)
    grown.build_latents()
    shutil.copytree(grown.latents / "catalog", workshop.latents / "catalog", dirs_exist_ok=True)
    assert faults(workshop) == []


def test_an_incomplete_set_is_compared_with_its_catalog_too(built_workshop):
    (built_workshop.latents / "manifest.json").unlink()
    segments(built_workshop)[-1].unlink()
    assert any("lacks the images of 3 shards" in fault for fault in faults(built_workshop))


def test_a_set_of_an_earlier_version_without_a_catalog_is_valid_and_says_what_it_cannot(earlier):
    shutil.rmtree(earlier.latents / "catalog")
    result = verify_set(earlier.latents)
    assert result.findings == []
    assert any("no images can be added" in note for note in result.notes)


def test_a_set_that_was_unpacked_and_packed_is_the_same_and_grows_without_doubles(built_workshop):
    workshop = built_workshop
    damage_pixels(write_image(workshop.images / "bad.png", 77, caption="bad"))
    workshop.build_latents()
    before = published_files(workshop.latents)
    catalog = [path.read_bytes() for path in segments(workshop)]
    unpack_set(workshop.latents, workshop.root / "loose")
    shutil.rmtree(workshop.latents)
    pack_set(workshop.root / "loose", workshop.latents)
    assert published_files(workshop.latents) == before
    assert [path.read_bytes() for path in segments(workshop)] == catalog
    write_images(workshop.images, 5, first=13)
    manifest = workshop.build_latents().built.manifest
    assert (manifest.num_records, len(manifest.undecodable)) == (18, 1)
    assert faults(workshop) == []


def test_loose_latents_with_a_record_missing_are_not_packed(built_workshop):
    unpack_set(built_workshop.latents, built_workshop.root / "loose")
    record = next((built_workshop.root / "loose").glob("*_*x*.safetensors"))
    record.unlink()
    record.with_suffix(".json").unlink()
    with pytest.raises(IncompatibleError, match="1 records are missing"):
        pack_set(built_workshop.root / "loose", built_workshop.root / "packed")


def test_loose_latents_without_a_catalog_keep_the_sets_shard_size_and_cannot_grow(earlier):
    unpack_set(earlier.latents, earlier.root / "loose")
    shutil.rmtree(earlier.root / "loose" / "catalog")
    shutil.rmtree(earlier.latents)
    manifest = pack_set(earlier.root / "loose", earlier.latents)
    assert max(entry.num_records for entry in manifest.shards) == 3
    assert faults(earlier) == []
    write_images(earlier.images, 5, first=13)
    refused(earlier, "catalog is missing")


def test_loose_latents_that_lost_their_catalog_are_told_so(built_workshop):
    unpack_set(built_workshop.latents, built_workshop.root / "loose")
    shutil.rmtree(built_workshop.root / "loose" / "catalog")
    with pytest.raises(IncompatibleError, match=r"the catalog is missing(.|\n)*put it back"):
        pack_set(built_workshop.root / "loose", built_workshop.root / "packed")
    assert not (built_workshop.root / "packed").exists()
