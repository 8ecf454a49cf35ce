from __future__ import annotations

import tarfile

import numpy as np
import pytest
import safetensors.numpy
from support.verified_sets import cut, flip, put_fifo

from sdxl_distill.core.noise import NOISE_ALGORITHM
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.loose.folder import LooseFolder, LooseRecord, is_loose
from sdxl_distill.loose.pack import pack_set
from sdxl_distill.loose.unpack import unpack_set
from sdxl_distill.shards.set_identity import NoiseRecipe
from sdxl_distill.verify.loose_folder import verify_loose
from sdxl_distill.verify.whole_set import verify_set

KINDS = ("latents", "text", "full", "compact")
ID = "0123456789abcdef" * 2


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def records(path):
    return sorted(path.glob("*_*x*.safetensors"))


@pytest.fixture
def loose(valid_sets, tmp_path):
    """The loose folder of a teacher with two draws."""
    unpack_set(valid_sets.build("full"), tmp_path / "loose")
    return tmp_path / "loose"


@pytest.mark.parametrize("kind", KINDS)
def test_an_unpacked_folder_holds_what_tar_finds_in_the_shards(valid_sets, tmp_path, kind):
    path = valid_sets.build(kind)
    unpack_set(path, tmp_path / "loose", num_threads=2)
    expected = {"set.json": (path / "set.json").read_bytes()}
    if kind == "text":
        expected["empty.safetensors"] = (path / "empty.safetensors").read_bytes()
    for shard in path.glob("*.tar"):
        with tarfile.open(shard, "r:") as tar:
            tar.extractall(tmp_path / "by_tar", filter="data")
    expected |= files(tmp_path / "by_tar")
    assert files(tmp_path / "loose") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_packing_what_was_unpacked_gives_the_same_files(valid_sets, tmp_path, kind):
    path = valid_sets.build(kind)
    unpack_set(path, tmp_path / "loose")
    packed = path.parent / "packed"
    pack_set(tmp_path / "loose", packed, valid_sets.root / "latents")
    assert files(packed) == files(path)


def test_a_packed_set_is_valid_and_refers_to_the_latents_from_where_it_lies(loose, tmp_path):
    packed = tmp_path / "some" / "where" / "else"
    pack_set(loose, packed, tmp_path / "latents")
    assert verify_set(packed).findings == []
    assert b'"place":"../../../latents"' in (packed / "set.json").read_bytes()


def test_latents_are_cut_anew_where_no_latents_set_is_named(valid_sets, tmp_path):
    unpack_set(valid_sets.latents(), tmp_path / "loose")
    manifest = pack_set(tmp_path / "loose", tmp_path / "packed", records_per_shard=4)
    shards = [(entry.width, entry.height, entry.num_records) for entry in manifest.shards]
    assert shards == [(64, 64, 4), (64, 64, 2), (64, 128, 2)]
    assert verify_set(tmp_path / "packed").findings == []


def test_a_shard_without_records_survives_the_way_there_and_back(valid_sets, tmp_path):
    valid_sets.shard_sizes = {(64, 64, 0): 0, (64, 64, 1): 2}
    path = valid_sets.build("compact")
    unpack_set(path, tmp_path / "loose")
    pack_set(tmp_path / "loose", path.parent / "packed", tmp_path / "latents")
    assert files(path.parent / "packed") == files(path)


def test_nothing_is_written_into_a_folder_that_holds_something(valid_sets, loose, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="holds 1 files"):
        unpack_set(valid_sets.root / "latents", tmp_path / "full")
    with pytest.raises(ConfigError, match="holds 1 files"):
        pack_set(loose, tmp_path / "full", tmp_path / "latents")
    assert files(tmp_path / "full") == {"x": b"mine"}


def test_a_damaged_record_is_not_unpacked(valid_sets, tmp_path):
    path = valid_sets.build("full")
    flip(next(path.glob("*.tar")), 1800)
    with pytest.raises(CorruptError, match="is damaged"):
        unpack_set(path, tmp_path / "loose")
    assert not (tmp_path / "loose" / "set.json").exists()


def test_missing_records_are_refused_with_their_number(loose, tmp_path):
    for record in records(loose)[:2]:
        record.unlink()
    with pytest.raises(IncompatibleError, match="2 records are missing, the first is"):
        pack_set(loose, tmp_path / "packed", tmp_path / "latents")
    assert not (tmp_path / "packed").exists()


def test_records_of_images_that_the_latents_lack_are_refused_with_their_number(loose, tmp_path):
    (loose / f"{ID}_64x64.safetensors").write_bytes(records(loose)[0].read_bytes())
    with pytest.raises(IncompatibleError, match=f"1 records are too many, the first is {ID}"):
        pack_set(loose, tmp_path / "packed", tmp_path / "latents")


@pytest.mark.parametrize("name", ["notes.txt", f"{ID}_64x64.json", f"{ID}_065x64.safetensors"])
def test_files_that_are_no_records_are_refused(loose, tmp_path, name):
    (loose / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="1 files are not records"):
        pack_set(loose, tmp_path / "packed", tmp_path / "latents")


def test_records_of_another_set_are_refused_with_their_number(valid_sets, loose, tmp_path):
    other = valid_sets.teacher("teacher_b", draws=2)
    unpack_set(other, tmp_path / "other")
    for record in records(loose)[:3]:
        record.write_bytes((tmp_path / "other" / record.name).read_bytes())
    with pytest.raises(IncompatibleError, match="3 records belong to set"):
        pack_set(loose, tmp_path / "packed", tmp_path / "latents")
    assert not (tmp_path / "packed").exists()


def test_records_made_from_other_latents_are_refused(valid_sets, loose, tmp_path):
    # Same configuration, hence fingerprint, but other bytes in the shards.
    later = type(valid_sets)(tmp_path / "later", valid_sets.shard_sizes)
    with pytest.raises(IncompatibleError, match="16 records were made from other latents"):
        pack_set(loose, tmp_path / "packed", later.latents(salt="later"))


def test_a_latents_set_of_another_configuration_is_refused(valid_sets, loose, tmp_path):
    other = type(valid_sets)(tmp_path / "other", valid_sets.shard_sizes)
    with pytest.raises(IncompatibleError, match="set latents has fingerprint"):
        pack_set(loose, tmp_path / "packed", other.latents(vae="9" * 64))


@pytest.mark.parametrize("damage", [cut, put_fifo, lambda path: flip(path, 20)])
def test_a_damaged_loose_file_is_not_packed(loose, tmp_path, damage):
    damage(records(loose)[0])
    with pytest.raises(CorruptError):
        pack_set(loose, tmp_path / "packed", tmp_path / "latents")
    assert not (tmp_path / "packed").exists()


def test_loose_files_without_set_json_are_refused_and_the_reason_given(loose, tmp_path):
    (loose / "set.json").unlink()
    with pytest.raises(ConfigError, match="files made elsewhere do not say which teacher"):
        pack_set(loose, tmp_path / "packed", tmp_path / "latents")


def test_predictions_are_not_packed_without_the_latents_they_follow(loose, tmp_path):
    with pytest.raises(ConfigError, match="add --latents DIR"):
        pack_set(loose, tmp_path / "packed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_loose_folder_of_every_kind_has_no_finding(valid_sets, tmp_path, kind):
    unpack_set(valid_sets.build(kind), tmp_path / "loose")
    result = verify_loose(tmp_path / "loose", num_threads=2)
    assert [str(finding) for finding in result.findings] == []
    draws = 2 if kind in ("full", "compact") else 1
    assert (result.num_records, result.num_draws, result.notes) == (8 * draws, draws, [])


def test_a_folder_is_loose_when_it_holds_records_and_no_shards(valid_sets, loose):
    assert is_loose(files(loose))
    assert not is_loose(files(valid_sets.root / "latents"))
    assert not is_loose({*files(loose), "teacher_a-64x64-000000.tar"})
    assert not is_loose({"notes.txt"})


@pytest.mark.parametrize(
    "name",
    [
        f"{ID}_64x64.safetensors.bak",
        f"{ID.upper()}_64x64.safetensors",
        f"{ID}_64x65.safetensors",
        f"{ID}_64x9000.safetensors",
        f"{ID}_64x64_d0.safetensors",
        f"{ID}_64x64_d1024.safetensors",
        f"{ID}_٦٤x64.safetensors",
        f"x{ID}_64x64.safetensors",
    ],
)
def test_names_that_are_nearly_those_of_records_are_strangers(name):
    assert LooseFolder.of([name]) == LooseFolder((), frozenset(), (name,))


def test_records_are_known_by_name():
    names = {f"{ID}_64x128_d3.safetensors", f"{ID}_64x128.safetensors", f"{ID}_64x128.json"}
    folder = LooseFolder.of({*names, "set.json", ".hidden"})
    assert folder.records == (LooseRecord(64, 128, 0, ID), LooseRecord(64, 128, 3, ID))
    assert (folder.sidecars, folder.strangers) == ({f"{ID}_64x128.json"}, ())


@pytest.mark.parametrize(
    "damage", [cut, put_fifo, lambda path: flip(path, 20), lambda path: path.write_bytes(b"")]
)
def test_a_damaged_loose_file_is_found(loose, damage):
    record = records(loose)[0]
    damage(record)
    (finding,) = verify_loose(loose).findings
    assert (finding.key, finding.error.exit_code) == (record.stem, 3)


def _rewrite(path, **changes):
    """Give a record other values, header and all in our canonical form."""
    content = bytearray(path.read_bytes())
    for name, value in changes.items():
        old = safetensors.numpy.load(bytes(content))[name]
        position = content.index(old.tobytes())
        content[position : position + old.nbytes] = value(old).astype(old.dtype).tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("teacher_pred", lambda values: values * np.nan, "256 values that are NaN"),
        ("timestep", lambda values: values + 1, "timestep is"),
        ("noise", lambda values: values[::-1], "the noise is not what its seed gives"),
        ("resolution", lambda values: values + 8, "resolution is"),
    ],
)
def test_a_wrong_value_in_a_loose_file_is_found(loose, tensor, change, message):
    record = records(loose)[0]
    _rewrite(record, **{tensor: change})
    (finding,) = verify_loose(loose).findings
    assert finding.key == record.stem
    assert message in finding.error.found


def test_without_set_json_seeds_are_computed_again_from_a_recipe_or_a_note_says_they_are_not(loose):
    (loose / "set.json").unlink()
    result = verify_loose(loose)
    assert (result.findings, len(result.notes)) == ([], 1)
    recipe = NoiseRecipe(NOISE_ALGORITHM, 42, 0, 1000)
    assert verify_loose(loose, recipe=recipe).findings == []
    assert verify_loose(loose, recipe=recipe).notes == []
    wrong = NoiseRecipe(NOISE_ALGORITHM, 43, 0, 1000)
    assert len(verify_loose(loose, recipe=wrong).findings) >= 16


def test_records_of_another_set_among_the_loose_are_found_with_their_number(
    valid_sets, loose, tmp_path
):
    unpack_set(valid_sets.teacher("teacher_b", draws=2), tmp_path / "other")
    record = records(loose)[0]
    record.write_bytes((tmp_path / "other" / record.name).read_bytes())
    (finding,) = verify_loose(loose).findings
    assert "15 of set" in finding.error.found
    assert finding.error.exit_code == 4


def test_an_image_in_two_buckets_and_draws_of_unequal_size_are_found(loose):
    record = records(loose)[0]
    image_id = record.name[:32]
    record.rename(loose / f"{image_id}_64x128.safetensors")
    messages = [finding.error.found for finding in verify_loose(loose).findings]
    assert len(messages) == 1  # its tensors are those of the old bucket
    records(loose)[-1].unlink()
    messages = " ".join(finding.error.found for finding in verify_loose(loose).findings)
    assert "the draws have different numbers of records" in messages


def test_files_that_are_no_records_are_found(loose):
    (loose / "notes.txt").write_bytes(b"x")
    (finding,) = verify_loose(loose).findings
    assert "'notes.txt'" in finding.error.found
    assert finding.error.exit_code == 2


def test_safetensors_made_elsewhere_are_findings_and_no_crash(tmp_path):
    tensors = {"teacher_pred": np.zeros((4, 8, 8), np.float16), "seed": np.zeros(3, np.int64)}
    safetensors.numpy.save_file(tensors, tmp_path / f"{ID}_64x64.safetensors")
    (finding,) = verify_loose(tmp_path).findings
    assert finding.error.exit_code == 3


def test_a_header_with_our_metadata_and_hostile_shapes_is_a_finding_and_no_crash(tmp_path):
    from sdxl_distill.shards.record import encode_record

    tensors = {
        "teacher_pred": np.zeros((4, 8, 8), np.float16),
        "seed": np.zeros(3, np.int64),
        "timestep": np.zeros((0,), np.int64),
    }
    content = encode_record(tensors, {"fingerprint": "0" * 64})
    (tmp_path / f"{ID}_64x64.safetensors").write_bytes(content)
    (finding,) = verify_loose(tmp_path).findings
    assert finding.error.found.startswith("tensors seed I64 [3]")


@pytest.mark.parametrize("sidecar_bytes", [22, 4000])
def test_packing_refuses_shards_that_no_reader_takes_before_one_is_written(
    valid_sets, tmp_path, monkeypatch, sidecar_bytes
):
    unpack_set(valid_sets.build("latents"), tmp_path / "loose")
    for sidecar in (tmp_path / "loose").glob("*_*.json"):
        sidecar.write_text('{"captions":["a cat"]}'.ljust(sidecar_bytes))
    monkeypatch.setattr("sdxl_distill.shards.legal_set.MAX_SHARD_BYTES", 10_240)
    with pytest.raises(ConfigError, match=r"set --records-per-shard to at most \d"):
        pack_set(tmp_path / "loose", tmp_path / "packed", records_per_shard=11)
    assert not (tmp_path / "packed").exists()
