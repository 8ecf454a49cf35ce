from __future__ import annotations

import hashlib
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from support.verified_sets import cut, flip, put_fifo, swap, synthetic_index

from sdxl_distill.shards.manifest import Manifest
from sdxl_distill.shards.record import RecordHeader
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.shard_set import open_shard_set
from sdxl_distill.verify.finding import MAX_PER_SHARD
from sdxl_distill.verify.whole_set import verify_set

KINDS = ("latents", "text", "full", "compact")


def shard(path, number=0, width=64, height=64, draw=0):
    return path / ShardName(path.name, width, height, number, draw).tar


def found(path, **options):
    return [finding.error.found for finding in verify_set(path, **options).findings]


def kinds_of(path, **options):
    return {type(finding.error).__name__ for finding in verify_set(path, **options).findings}


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_set_of_every_kind_has_no_finding(valid_sets, kind):
    result = verify_set(valid_sets.build(kind))
    assert [str(finding) for finding in result.findings] == []
    assert result.exit_code == 0


def test_a_verification_counts_what_it_read(valid_sets):
    path = valid_sets.build("full")
    result = verify_set(path)
    num_bytes = sum(tar.stat().st_size for tar in path.glob("*.tar"))
    counts = result.num_records, result.num_shards, result.num_draws, result.num_bytes
    assert counts == (
        2 * sum(valid_sets.shard_sizes.values()),
        2 * len(valid_sets.shard_sizes),
        2,
        num_bytes,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_anywhere_in_a_tar_is_found(valid_sets, kind):
    path = valid_sets.build(kind)
    tar = shard(path, number=1)
    content = tar.read_bytes()
    for offset in range(0, len(content), 331):
        flip(tar, offset)
        result = verify_set(path)
        assert {finding.shard for finding in result.findings} == {tar.name}, offset
        assert result.exit_code == 3
        tar.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_anywhere_in_an_index_is_found(valid_sets, kind):
    path = valid_sets.build(kind)
    idx = shard(path, number=1).with_suffix(".idx")
    content = idx.read_bytes()
    for offset in range(0, len(content), 61):
        flip(idx, offset)
        assert verify_set(path, quick=True).exit_code == 3, offset
        idx.write_bytes(content)


def test_a_damaged_payload_names_set_shard_key_tensor_and_remedy(valid_sets):
    path = valid_sets.build("full")
    with open_shard_set(path) as shard_set:
        name = shard_set.manifest.names()[0]
        index = shard_set.index(name)
    flip(path / name.tar, int(index.offsets[1]) + index.header.place("noise").offset)
    (finding,) = verify_set(path).findings
    assert (finding.set_id, finding.shard, finding.key) == (path.name, name.tar, index.key(1))
    assert "noise" in finding.error.found
    assert "--repair" in str(finding)


@pytest.mark.parametrize("damage", [cut, put_fifo, lambda path: path.unlink()])
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("quick", [False, True])
def test_a_shard_file_that_is_cut_missing_or_a_pipe_is_found(valid_sets, damage, suffix, quick):
    path = valid_sets.build("compact")
    damage(shard(path).with_suffix(suffix))
    result = verify_set(path, quick=quick)
    assert [finding.shard for finding in result.findings] == [shard(path).name]
    assert result.exit_code == 3


@pytest.mark.parametrize("damage", [cut, put_fifo, lambda path: flip(path, 99)])
@pytest.mark.parametrize("name", ["set.json", "manifest.json"])
def test_a_damaged_set_record_or_manifest_is_found_and_the_shards_are_still_read(
    valid_sets, damage, name
):
    path = valid_sets.build("full")
    damage(path / name)
    result = verify_set(path)
    assert [finding.shard for finding in result.findings] == [name]
    assert result.exit_code == 3
    assert result.num_records == 2 * sum(valid_sets.shard_sizes.values())


def test_two_shards_of_a_set_that_were_swapped_are_found(valid_sets):
    path = valid_sets.build("text")
    for suffix in (".tar", ".idx"):
        swap(shard(path, 0).with_suffix(suffix), shard(path, 1).with_suffix(suffix))
    assert {finding.shard for finding in verify_set(path).findings} == {
        shard(path, 0).name,
        shard(path, 1).name,
    }


def test_a_shard_of_another_set_under_this_ones_name_is_found(valid_sets):
    path = valid_sets.build("full")
    other = valid_sets.teacher("teacher_b", "full", draws=2)
    for suffix in (".tar", ".idx"):
        swap(shard(path).with_suffix(suffix), shard(other).with_suffix(suffix))
    messages = " ".join(found(path))
    assert "the index lists records of set" in messages
    assert "has another header" in messages


def test_a_complete_pair_of_an_earlier_build_is_found(valid_sets):
    path = valid_sets.build("full")
    older = valid_sets.teacher("teacher_a", folder="older", draws=2,
                          change={"teacher_pred": lambda values: values + 1})  # fmt: skip
    for suffix in (".tar", ".idx"):
        swap(shard(path).with_suffix(suffix), shard(older).with_suffix(suffix))
    (message,) = found(path, quick=True)
    assert message == "the index differs from the manifest in tar_sha256, index_digest"


def test_damage_in_one_shard_does_not_hide_damage_in_another(valid_sets):
    path = valid_sets.build("full")
    cut(shard(path, 0))
    shard(path, 1).with_suffix(".idx").unlink()
    flip(shard(path, 0, height=128), 700)
    assert {finding.shard for finding in verify_set(path).findings} == {
        shard(path, 0).name,
        shard(path, 1).name,
        shard(path, 0, height=128).name,
    }


def test_a_quick_verification_leaves_the_tars_closed(valid_sets):
    path = valid_sets.build("full")
    flip(shard(path), 700)
    assert verify_set(path, quick=True).findings == []
    assert verify_set(path).exit_code == 3


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("teacher_pred", lambda values: values * np.nan, "teacher_pred has 256 values that are"),
        ("pooled_embeds", lambda values: values / 0, "pooled_embeds has 5 values that are NaN"),
        ("timestep", lambda values: (values + 1) % 1000, "timestep is"),
        ("seed", lambda values: values ^ 1, "seed is"),
        ("seed", lambda values: values - (1 << 40), "seed is"),
        ("noise", lambda values: values[::-1], "the noise is not what its seed gives"),
        ("resolution", lambda values: values[::-1] + 8, "resolution is"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_wrong_value_under_good_digests_is_found(valid_sets, tensor, change, message):
    valid_sets.latents()
    path = valid_sets.teacher("teacher_a", change={tensor: change})
    result = verify_set(path)
    messages = [finding.error.found for finding in result.findings]
    assert any(text.startswith(message) for text in messages), messages
    assert result.exit_code == 3
    assert all(finding.key for finding in result.findings if "more" not in finding.error.found)


@pytest.mark.parametrize(
    "time_ids",
    [
        (128, 192, 0, 3, 128, 64),  # the target is another bucket
        (0, 192, 0, 3, 64, 64),
        (128, 192, 0, -1, 64, 64),
        (128, 192, 0, 33, 64, 64),  # a cover-resize gives 96 × 64
    ],
)
def test_implausible_time_ids_are_found(valid_sets, time_ids):
    valid_sets.shard_sizes = {(64, 64, 0): 1}
    valid_sets.latents_change = {"time_ids": lambda _: np.array(time_ids, np.int32)}
    (message,) = found(valid_sets.latents())
    assert message == f"time_ids are {list(time_ids)}"


def test_findings_of_a_shard_are_bounded_and_counted(valid_sets):
    valid_sets.shard_sizes = {(64, 64, 0): MAX_PER_SHARD + 3}
    valid_sets.latents()
    path = valid_sets.teacher("teacher_a", change={"timestep": lambda values: (values + 1) % 1000})
    messages = found(path)
    assert len(messages) == MAX_PER_SHARD + 1
    assert messages[-1] == "3 more findings"


def test_an_unfinished_set_is_incomplete_but_what_is_there_is_verified(valid_sets):
    path = valid_sets.build("compact")
    (path / "manifest.json").unlink()
    shard(path, 0).with_suffix(".idx").unlink()
    flip(shard(path, 1), 600)
    result = verify_set(path)
    kinds = [type(finding.error).__name__ for finding in result.findings]
    assert kinds[0] == "ConfigError"
    assert "5 shards are committed, 1 tars" in result.findings[0].error.found
    assert {finding.shard for finding in result.findings[1:]} == {shard(path, 1).name}
    assert result.num_shards == 5
    assert result.exit_code == 3


def test_a_set_that_lost_its_set_record_is_still_read_by_its_manifest(valid_sets):
    path = valid_sets.build("full")
    (path / "set.json").unlink()
    result = verify_set(path)
    assert [finding.shard for finding in result.findings] == ["set.json"]
    assert result.num_shards == 6


def test_a_folder_without_a_set_is_a_finding_that_says_so(tmp_path):
    result = verify_set(tmp_path)
    assert [finding.error.found for finding in result.findings] == ["there is no set.json"]
    assert result.exit_code == 2


def test_what_does_not_belong_into_the_folder_is_found(valid_sets):
    path = valid_sets.build("full")
    (path / "notes.txt").write_text("x")
    (path / "other-64x64-000000.tar").write_bytes(b"")
    (path / f"{path.name}-64x64-000009.idx").write_bytes(b"")
    (path / ".tmp-left").write_bytes(b"")
    messages = found(path)
    assert messages == [
        "the folder holds 'notes.txt', which does not belong to the set",
        "the folder holds 'other-64x64-000000.tar', which does not belong to the set",
        f"the folder holds '{path.name}-64x64-000009.idx', which the manifest does not list",
    ]


@pytest.mark.parametrize("damage", [cut, put_fifo, lambda path: path.unlink()])
def test_a_damaged_record_of_the_empty_caption_is_found(valid_sets, damage):
    path = valid_sets.build("text")
    damage(path / "empty.safetensors")
    (finding,) = verify_set(path).findings
    assert (finding.shard, finding.error.exit_code) == ("empty.safetensors", 3)


def test_a_manifest_of_another_set_is_found(valid_sets):
    path = valid_sets.build("full")
    other = valid_sets.teacher("teacher_a", folder="other", draws=2, version="2")
    (path / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    assert "IncompatibleError" in kinds_of(path)


def test_a_noise_algorithm_that_is_not_known_is_found_and_no_noise_is_called_wrong(valid_sets):
    valid_sets.latents()
    path = valid_sets.teacher("teacher_a", recipe={"algorithm": "mersenne-1"})
    (finding,) = verify_set(path).findings
    assert finding.error.found == "noise algorithm 'mersenne-1'"
    assert finding.error.exit_code == 4


def test_an_image_in_two_shards_is_found(valid_sets):
    valid_sets.ids = lambda _: [hashlib.sha256(b"one").hexdigest()[:32]]
    valid_sets.shard_sizes = {(64, 64, 0): 1, (64, 128, 0): 1}
    (message,) = found(valid_sets.latents())
    assert message.endswith("is in more than one shard")


def test_a_record_of_an_image_that_did_not_decode_is_found(valid_sets):
    path = valid_sets.latents()
    with open_shard_set(path) as shard_set:
        name = shard_set.manifest.names()[0]
        key = shard_set.index(name).key(0)
        manifest = replace(shard_set.manifest, undecodable=(key,))
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    (finding,) = verify_set(path).findings
    assert finding.key == key


def test_draws_made_from_different_latents_shards_are_found(valid_sets):
    path = valid_sets.build("full")
    with open_shard_set(path) as shard_set:
        manifest = shard_set.manifest
    shards = (manifest.shards[0], manifest.shards[1]._replace(source_sha256="0" * 64))
    manifest = replace(manifest, shards=shards + manifest.shards[2:])
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    assert "IncompatibleError" in kinds_of(path, quick=True)


def test_findings_do_not_depend_on_the_number_of_threads(valid_sets):
    path = valid_sets.build("full")
    for number in range(2):
        flip(shard(path, number), 1800)
    texts = [[str(f) for f in verify_set(path, num_threads=n).findings] for n in (1, 4)]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_a_hundred_thousand_records_are_verified_quickly_in_two_seconds(tmp_path, valid_sets):
    path = _synthetic_set(tmp_path, valid_sets, 200)
    started = time.process_time()
    result = verify_set(path, quick=True)
    assert (result.num_records, result.findings) == (102_400, [])
    assert time.process_time() - started < 2


def test_a_verification_holds_eight_bytes_a_record_and_two_kilobytes_a_shard(tmp_path, valid_sets):
    path, held = _synthetic_set(tmp_path, valid_sets, 100), []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        verify_set(
            path,
            quick=True,
            on_progress=lambda *_: held.append(tracemalloc.get_traced_memory()[0] - before),
        )
    finally:
        tracemalloc.stop()
    # Six shards are in flight, and a list that grows has room for an eighth more.
    in_flight = 6 * (path / "teacher_a-64x64-000000.idx").stat().st_size
    assert held[-1] < 100 * (512 * 8 * 1.125 + 2048) + in_flight


def _synthetic_set(root, valid_sets, num_shards):
    identity = SetIdentity.from_bytes((valid_sets.build("compact") / "set.json").read_bytes(), "")
    path = root / identity.id
    path.mkdir()
    header = RecordHeader.build(identity.schema, 64, 64, identity.fingerprint, "0" * 64)
    indices = [
        synthetic_index(ShardName(identity.id, 64, 64, number), header)
        for number in range(num_shards)
    ]
    for index in indices:
        (path / index.name.idx).write_bytes(index.to_bytes())
        with (path / index.name.tar).open("wb") as tar:
            tar.truncate(index.tar_bytes)
    (path / "set.json").write_bytes(identity.to_bytes())
    (path / "manifest.json").write_bytes(Manifest.build(identity, 0, indices).to_bytes())
    return path
