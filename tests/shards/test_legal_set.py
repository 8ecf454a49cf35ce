"""The limits: consistent with each other, checked in plans, enough for 10⁹ records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from support.memory_file import MemoryFile

from sdxl_distill import limits
from sdxl_distill.errors import ConfigError
from sdxl_distill.estimate.set_size import planned_size
from sdxl_distill.fingerprint import canonical_json
from sdxl_distill.shards import legal_set, manifest as manifest_module, writer as writer_module
from sdxl_distill.shards.index import tar_layout
from sdxl_distill.shards.legal_set import Remedy, ShardLoad, most_records, require_legal_shards
from sdxl_distill.shards.manifest import Manifest, ShardEntry, entries_to_columns
from sdxl_distill.shards.record import (
    RecordHeader,
    encode_record,
    latents_schema,
    predictions_schema,
    text_schema,
)
from sdxl_distill.shards.set_identity import SetIdentity
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.writer import ShardWriter

SDXL = (4, 77, 2048, 1280)
COMPACT = predictions_schema("compact", "F16", *SDXL)
FULL = predictions_schema("full", "F16", *SDXL)
SCHEMAS = {
    "latents": latents_schema(),
    "text": text_schema(*SDXL[1:]),
    "compact": COMPACT,
    "full": FULL,
    "full in float32": predictions_schema("full", "F32", *SDXL),
}
DIGEST = "f" * 64


def _record_bytes(schema, side=1024):
    return RecordHeader.build(schema, side, side, DIGEST, DIGEST).record_bytes


def _refusal(schema, *loads, **options):
    with pytest.raises(ConfigError) as caught:
        require_legal_shards("a", schema, loads, Remedy(), **options)
    return caught.value


@given(st.integers(1, limits.MAX_RECORD_BYTES), st.integers(0, limits.MAX_SIDECAR_BYTES))
def test_one_record_more_than_most_makes_a_shard_too_large(record_bytes, sidecar_bytes):
    most = most_records(record_bytes, sidecar_bytes)
    sizes = np.full(most + 1, sidecar_bytes, np.int64)
    assert tar_layout(record_bytes, sizes[1:])[1] <= limits.MAX_SHARD_BYTES
    assert most == limits.MAX_RECORDS or tar_layout(record_bytes, sizes)[1] > limits.MAX_SHARD_BYTES


def test_the_largest_legal_record_fits_into_a_shard():
    assert most_records(limits.MAX_RECORD_BYTES, limits.MAX_SIDECAR_BYTES) > 0
    assert _record_bytes(SCHEMAS["full in float32"], limits.MAX_SIDE_PX) < limits.MAX_RECORD_BYTES


@pytest.mark.parametrize("letter", ["\x01", '"', "é", "水", "🙂", "\uffff"])
def test_the_longest_caption_of_any_letter_fits_into_a_sidecar(letter):
    caption = letter * (limits.MAX_CAPTION_BYTES // len(letter.encode()))
    path = "\x01" * 4095
    sidecar = canonical_json({"captions": [caption], "source": path, "subset": path})
    assert len(sidecar) < limits.MAX_SIDECAR_BYTES - 4096


def test_a_row_of_a_manifest_takes_no_more_than_is_planned_for():
    side, widest = limits.MAX_SIDE_PX, ShardEntry._fields
    numbers = (side, side, limits.MAX_SHARDS - 1, limits.MAX_DRAWS - 1)
    entry = ShardEntry(
        *numbers,
        limits.MAX_RECORDS,
        limits.MAX_SHARD_BYTES,
        DIGEST,
        DIGEST,
        DIGEST[:32],
        DIGEST[:32],
        DIGEST,
        DIGEST,
    )
    one, two = (len(canonical_json(entries_to_columns([entry] * count))) for count in (1, 2))
    assert len(widest) == 12 and two - one == limits.MANIFEST_BYTES_PER_SHARD
    planned = limits.MAX_SHARDS * limits.MANIFEST_BYTES_PER_SHARD + limits.MAX_SET_IDENTITY_BYTES
    assert planned < 0.75 * limits.MAX_MANIFEST_BYTES


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("side", [1024, 2048])
def test_ten_to_the_ninth_records_have_a_legal_plan(kind, side):
    schema, has_sidecars = SCHEMAS[kind], kind == "latents"
    sidecar_bytes = 1000 if has_sidecars else 0
    count = most_records(_record_bytes(schema, side), sidecar_bytes)
    sizes = (sidecar_bytes,) * count * has_sidecars
    num_shards = -(-(10**9) // count)
    assert num_shards <= limits.MAX_SHARDS
    require_legal_shards("a", schema, [ShardLoad(side, side, count, sizes)], Remedy())


def test_the_plan_of_the_documentation_is_legal_and_takes_what_it_says():
    count, num_shards = 4096, 244_141
    assert count * (num_shards - 1) < 10**9 <= count * num_shards
    loads = [ShardLoad(1024, 1024, count)] * num_shards
    num_gigabytes = {"latents": 0.5, "text": 1.3, "compact": 0.5}
    for kind, expected in num_gigabytes.items():
        require_legal_shards("a", SCHEMAS[kind], loads, Remedy())
        size = planned_size(SCHEMAS[kind], [(1024, 1024, count)])
        assert round(size.num_bytes / 1e9, 1) == expected
    assert round(num_shards * limits.MANIFEST_BYTES_PER_SHARD / 1e6) == 92
    loads = [ShardLoad(1024, 1024, 2048)] * 488_282
    require_legal_shards("a", FULL, loads, Remedy())


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_value_that_a_refusal_names_works_and_one_more_does_not(kind):
    schema = SCHEMAS[kind]
    error = _refusal(schema, ShardLoad(2048, 2048, 60_000), ShardLoad(512, 512, 7))
    assert (error.where, error.exit_code) == ("data.records_per_shard", 2)
    most = int(str(error).rsplit(" ", 1)[1])
    require_legal_shards("a", schema, [ShardLoad(2048, 2048, most)], Remedy())
    assert f"at most {most}" in str(_refusal(schema, ShardLoad(2048, 2048, most + 1)))


def test_long_captions_count():
    few = (1000,) * 511 + (limits.MAX_SIDECAR_BYTES,)
    require_legal_shards("a", latents_schema(), [ShardLoad(1024, 1024, 512, few)], Remedy())
    many = (limits.MAX_SIDECAR_BYTES,) * 512
    error = _refusal(latents_schema(), ShardLoad(1024, 1024, 512, many))
    assert error.action == "set data.records_per_shard to at most 252"


def test_too_many_shards_are_refused_with_a_number_that_is_enough():
    loads = [ShardLoad(1024, 1024, 10)] * 300_001
    require_legal_shards("a", COMPACT, loads, Remedy(), draws=3)
    error = _refusal(COMPACT, *loads, draws=4)
    assert "1,200,004 shards" in error.found
    assert error.action == "set data.records_per_shard to at least 14 and at most 16256"


def test_a_record_beyond_the_limit_is_refused_by_its_bucket():
    error = _refusal(latents_schema(4096), ShardLoad(8192, 8192, 1))
    assert error.where == "bucket 8192x8192"


def test_a_writer_refuses_the_record_that_would_make_its_shard_too_large(monkeypatch):
    for module in (writer_module, legal_set):
        monkeypatch.setattr(module, "MAX_SHARD_BYTES", 20_480)
    schema = text_schema(1, 512, 8)
    header = RecordHeader.build(schema, 64, 64, DIGEST, DIGEST)
    name = ShardName("text", 64, 64, 0)
    tensors = {
        "encoder_hidden_states": np.zeros((1, 512), np.float16),
        "pooled_embeds": np.zeros(8, np.float16),
    }
    record = encode_record(tensors, {"fingerprint": DIGEST, "source_sha256": DIGEST})
    assert record == header.encode(tensors)
    writer = ShardWriter(MemoryFile(), name, header)
    num_legal = most_records(header.record_bytes)
    for number in range(num_legal):
        writer.write(name.key(f"{number:032x}"), record)
    with pytest.raises(ConfigError, match=r"records_per_shard"):
        writer.write(name.key(DIGEST[:32]), record)


def test_a_manifest_that_no_reader_takes_is_not_written(monkeypatch):
    identity = SetIdentity(kind="latents", id="latents", schema=latents_schema())
    keys = [f"{number:032x}_64x64" for number in range(100)]
    manifest = Manifest.build(identity, 0, [], keys)
    size = len(manifest.to_bytes())
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", size)
    manifest.to_bytes()
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(ConfigError, match="100 images that did not decode"):
        manifest.to_bytes()
