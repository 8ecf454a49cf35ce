"""The reader: exact bytes into the caller's memory, every damaged byte named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.shard_set import ShardSet, open_shard_set

KINDS = [("latents", "full"), ("text", "full"), ("predictions", "full"), ("predictions", "compact")]


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_every_record_of_a_set_is_read_as_it_was_written(kind: str, layout: str, sets) -> None:
    small = sets.complete(kind, layout, draws=2 if kind == "predictions" else 1)
    with open_shard_set(small.directory) as shard_set:
        for (name, record), written in small.written.items():
            read = shard_set.reader(name).read_record(record)
            assert read.keys() == written.keys()
            assert all(np.array_equal(read[key].numpy(), written[key]) for key in read)


def test_a_tensor_is_read_into_a_slice_of_a_batch(sets) -> None:
    small = sets.complete()
    with open_shard_set(small.directory) as shard_set:
        name = shard_set.manifest.names()[0]
        batch = torch.full((3, 4, 8, 8), -1.0, dtype=torch.float16)
        shard_set.reader(name).read_tensor_into(2, "teacher_pred", batch[1])
    assert np.array_equal(batch[1].numpy(), small.written[name, 2]["teacher_pred"])
    assert (batch[0] == -1).all()
    assert (batch[2] == -1).all()


def test_arrays_and_plain_memory_are_buffers_too(sets) -> None:
    small = sets.complete()
    with open_shard_set(small.directory) as shard_set:
        name = shard_set.manifest.names()[0]
        written = small.written[name, 0]["noise"]
        array, memory = np.empty_like(written), memoryview(bytearray(written.nbytes))
        shard_set.reader(name).read_tensor_into(0, "noise", array)
        shard_set.reader(name).read_tensor_into(0, "noise", memory)
    assert np.array_equal(array, written)
    assert bytes(memory) == written.tobytes()


def test_a_batch_of_records_is_read_in_the_order_asked_for(sets) -> None:
    small = sets.complete()
    with open_shard_set(small.directory) as shard_set:
        name = shard_set.manifest.names()[0]
        batch = torch.empty(4, 1, dtype=torch.int64)
        shard_set.reader(name).read_records([2, 0, 2, 1], "seed", batch)
    expected = [[int(small.written[name, record]["seed"][0])] for record in (2, 0, 2, 1)]
    assert batch.tolist() == expected


def test_sidecars_are_read(sets) -> None:
    small = sets.complete("latents")
    with open_shard_set(small.directory) as shard_set:
        for name, record in small.written:
            reader = shard_set.reader(name)
            assert reader.read_sidecar(record) == small.sidecar(reader.index.image_id(record))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(4, 8, 7, dtype=torch.float16),
        torch.empty(4, 8, 8, dtype=torch.bfloat16),
        torch.empty(8, 4, 8, dtype=torch.float16).transpose(0, 1),
        memoryview(bytearray(511)),
    ],
    ids=["size", "dtype", "strides", "bytes"],
)
def test_an_unfit_buffer_is_refused(out: torch.Tensor | memoryview, sets) -> None:
    small = sets.complete()
    with open_shard_set(small.directory) as shard_set:
        reader = shard_set.reader(shard_set.manifest.names()[0])
        with pytest.raises(ValueError, match="buffer|contiguous"):
            reader.read_tensor_into(0, "teacher_pred", out)


def test_an_unknown_tensor_is_a_key_error(sets) -> None:
    small = sets.complete(layout="compact")
    with open_shard_set(small.directory) as shard_set:
        reader = shard_set.reader(shard_set.manifest.names()[0])
        with pytest.raises(KeyError):
            reader.read_tensor_into(0, "noise", torch.empty(4, 8, 8, dtype=torch.float16))


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x01]))


def read_all(shard_set: ShardSet) -> None:
    reader = shard_set.reader(shard_set.manifest.names()[0])
    for record in range(reader.index.num_records):
        reader.read_record(record)


def test_no_flipped_byte_of_a_record_or_its_sidecar_is_read_silently(sets) -> None:
    small = sets.complete("latents", shards=((64, 64, 2),))
    index = small.indices[0]
    path = small.directory / index.name.tar
    spans = [(int(index.offsets[0]), index.header.record_bytes)]
    spans.append((index.sidecar_offset(1), int(index.sidecar_sizes[1])))
    silent = []
    with open_shard_set(small.directory) as shard_set:
        for begin, size in spans:
            for position in range(begin, begin + size, 3):
                flip(path, position)
                try:
                    read_all(shard_set)
                    silent.append(position)
                except CorruptError:
                    pass
                flip(path, position)
        read_all(shard_set)
    assert silent == []


def test_a_damaged_tensor_is_named_with_set_shard_key_bytes_and_remedy(sets) -> None:
    small = sets.complete(shards=((64, 64, 2),))
    index = small.indices[0]
    place = index.header.place("noise")
    begin = int(index.offsets[1]) + place.offset
    flip(small.directory / index.name.tar, begin + 100)
    out = torch.empty(4, 8, 8, dtype=torch.float16)
    with open_shard_set(small.directory) as shard_set:
        reader = shard_set.reader(index.name)
        reader.read_tensor_into(0, "noise", out)
        with pytest.raises(CorruptError) as caught:
            reader.read_tensor_into(1, "noise", out)
    assert caught.value.where == (
        f"set teacher.v1, shard teacher.v1-64x64-000000.tar, key {index.key(1)}"
    )
    assert f"tensor noise is damaged between bytes {begin} and {begin + 512}" in str(caught.value)
    assert "--repair" in str(caught.value.action)


def test_a_tar_cut_while_it_is_open_is_an_error_not_a_signal(sets) -> None:
    small = sets.complete(shards=((64, 64, 2),))
    index = small.indices[0]
    with open_shard_set(small.directory) as shard_set:
        reader = shard_set.reader(index.name)
        with (small.directory / index.name.tar).open("r+b") as file:
            file.truncate(int(index.offsets[1]) + 10)
        reader.read_record(0)
        with pytest.raises(CorruptError, match="the file ends at byte"):
            reader.read_record(1)


def test_threads_that_share_one_open_shard_read_the_right_bytes(sets) -> None:
    small = sets.complete(shards=((64, 64, 3), (64, 64, 3), (64, 64, 3)))
    places = list(small.written) * 40

    with open_shard_set(small.directory, max_open_shards=1) as shard_set:

        def is_right(position: int) -> bool:
            name, record = places[position * 7 % len(places)]
            out = torch.empty(4, 8, 8, dtype=torch.float16)
            shard_set.reader(name).read_tensor_into(record, "teacher_pred", out)
            return np.array_equal(out.numpy(), small.written[name, record]["teacher_pred"])

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(is_right, range(len(places))))
