"""The writer: deterministic plain tars, an index that is that of the tar, flat memory."""

from __future__ import annotations

import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import webdataset
from support.memory_file import MemoryFile

from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.shards.record import RecordHeader, latents_schema
from sdxl_distill.shards.shard_name import ShardName
from sdxl_distill.shards.tar_index import index_of_tar
from sdxl_distill.shards.writer import ShardWriter
from sdxl_distill.storage.fsio import Directory

KINDS = [("latents", "full"), ("text", "full"), ("predictions", "full"), ("predictions", "compact")]
FINGERPRINT = "a" * 64


@pytest.mark.parametrize(("kind", "layout"), KINDS)
@pytest.mark.parametrize("draw", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_writers_index_is_the_index_of_its_tar(
    kind: str, layout: str, draw: int, count: int, sets, ids
) -> None:
    small = sets.start(kind, layout)
    name = ShardName(small.identity.id, 64, 128, 3, draw)
    index = small.add_shard(name, ids(count))
    with Directory(small.directory) as directory:
        found = index_of_tar(directory.open(name.tar), name, small.header(name))
    assert found.to_bytes() == index.to_bytes()
    assert index.num_records == count


def test_two_writers_of_the_same_records_write_the_same_bytes(sets, ids) -> None:
    small = sets.start("latents")
    contents = []
    for number in range(2):
        name = ShardName("latents", 64, 64, number)
        small.add_shard(name, ids(4))
        contents.append((small.directory / name.tar).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.filterwarnings(  # webdataset leaves its files to the garbage collector
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_plain_webdataset_reads_a_shard(kind: str, layout: str, sets, ids) -> None:
    small = sets.start(kind, layout)
    name = ShardName(small.identity.id, 64, 64, 0)
    identities = ids(4)
    small.add_shard(name, identities)
    url = str(small.directory / name.tar)
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [name.key(id) for id in identities]
    for record, sample in enumerate(samples):
        tensors = safetensors.torch.load(sample["safetensors"])
        written = small.written[name, record]
        assert tensors.keys() == written.keys()
        assert all(np.array_equal(tensors[key].numpy(), written[key]) for key in tensors)
        assert sample.get("json") == small.sidecar(identities[record])


@pytest.mark.parametrize(("draw", "suffix"), [(0, ""), (3, "_d3")])
def test_unpacking_a_shard_gives_the_loose_layout(draw: int, suffix: str, sets, ids) -> None:
    small = sets.start()
    name = ShardName(small.identity.id, 64, 128, 0, draw)
    small.add_shard(name, ids(3))
    with tarfile.open(small.directory / name.tar) as tar:
        names = tar.getnames()
    assert names == [f"{identity}_64x128{suffix}.safetensors" for identity in ids(3)]


def test_a_sidecar_follows_its_record(sets, ids) -> None:
    small = sets.start("latents")
    name = ShardName("latents", 64, 64, 0)
    small.add_shard(name, ids(2))
    with tarfile.open(small.directory / name.tar) as tar:
        extensions = [member.name.partition(".")[2] for member in tar]
    assert extensions == ["safetensors", "json"] * 2


@pytest.mark.parametrize("order", [[1, 0], [0, 0]], ids=["unsorted", "twice"])
def test_keys_out_of_order_give_no_index(order: list[int], sets, ids) -> None:
    small = sets.start()
    name = ShardName(small.identity.id, 64, 64, 0)
    with pytest.raises(CorruptError, match="out of order or listed twice"):
        small.add_shard(name, [ids(2)[position] for position in order])


def test_memory_stays_flat_while_a_large_shard_is_written(tmp_path: Path, ids) -> None:
    name = ShardName("latents", 512, 512, 0)
    header = RecordHeader.build(latents_schema(4), 512, 512, FINGERPRINT)
    tensors = {"latents": np.zeros((4, 64, 64), np.float16), "time_ids": np.zeros(6, np.int32)}
    record = header.encode(tensors)
    with Directory(tmp_path) as directory, directory.stage() as staged:
        writer = ShardWriter(staged, name, header)
        tracemalloc.start()
        for identity in ids(600):
            writer.write(name.key(identity), record)
        index = writer.close()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert index.tar_bytes > 19 << 20
    assert peak_bytes < 3 << 20


def test_a_full_disk_is_a_storage_error(ids) -> None:
    name = ShardName("latents", 512, 512, 0)
    header = RecordHeader.build(latents_schema(4), 512, 512, FINGERPRINT)
    record = header.content + bytes(header.record_bytes - len(header.content))
    full = MemoryFile()
    full.file.close()
    with Path("/dev/full").open("wb", buffering=0) as full.file:
        writer = ShardWriter(full, name, header)
        writer.write(name.key(ids(1)[0]), record)
        with pytest.raises(StorageError, match="No space left"):
            writer.close()
