"""Records: schemas as documented, headers shared byte for byte, strangers' schemas refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.record import (
    RecordHeader,
    RecordSchema,
    TensorSpec,
    encode_record,
    latents_schema,
    predictions_schema,
    text_schema,
)

FINGERPRINT, SOURCE = "a" * 64, "b" * 64
SDXL_FULL = predictions_schema("full", "F16", 4, 77, 2048, 1280)


def zeros(schema: RecordSchema, width: int, height: int) -> dict[str, torch.Tensor]:
    content = encode_empty(schema, width, height)
    return safetensors.torch.load(content)


def encode_empty(schema: RecordSchema, width: int, height: int) -> bytes:
    header = RecordHeader.build(schema, width, height, FINGERPRINT, SOURCE)
    return header.content + bytes(header.record_bytes - len(header.content))


def test_a_full_sdxl_record_has_the_documented_tensors() -> None:
    assert SDXL_FULL.resolve(896, 1152) == {
        "teacher_pred": ("F16", (4, 144, 112)),
        "noise": ("F16", (4, 144, 112)),
        "timestep": ("I64", (1,)),
        "seed": ("I64", (1,)),
        "resolution": ("I32", (2,)),
        "encoder_hidden_states": ("F16", (77, 2048)),
        "pooled_embeds": ("F16", (1280,)),
    }


def test_a_full_record_at_1024_px_takes_580_kilobytes() -> None:
    assert 580_000 < RecordHeader.build(SDXL_FULL, 1024, 1024, FINGERPRINT).record_bytes < 581_000


def test_a_compact_record_holds_a_seed_in_place_of_noise_and_text() -> None:
    compact = predictions_schema("compact", "F16", 4, 77, 2048, 1280)
    header = RecordHeader.build(compact, 64, 64, FINGERPRINT, SOURCE)
    assert {place.name for place in header.places} == {
        "teacher_pred", "timestep", "seed", "resolution",
    }  # fmt: skip
    assert header.recreates_noise
    assert not RecordHeader.build(SDXL_FULL, 64, 64, FINGERPRINT).recreates_noise


def test_the_library_reads_a_record_with_the_shapes_of_its_schema() -> None:
    read = zeros(SDXL_FULL, 896, 1152)
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        name: shape for name, (_, shape) in SDXL_FULL.resolve(896, 1152).items()
    }


def test_a_record_is_read_back_bit_for_bit() -> None:
    schema = predictions_schema("full", "BF16", 4, 3, 4, 5)
    header = RecordHeader.build(schema, 64, 128, FINGERPRINT, SOURCE)
    tensors = {
        name: torch.randn(tensor.shape).mul(9).to(tensor.dtype)
        for name, tensor in zeros(schema, 64, 128).items()
    }
    record = header.encode(tensors)
    for read in (safetensors.torch.load(record), header.decode(bytearray(record))):
        assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read.items()} == {
            name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()
        }


def test_a_header_is_parsed_back_to_itself() -> None:
    header = RecordHeader.build(SDXL_FULL, 832, 1216, FINGERPRINT, SOURCE)
    assert RecordHeader.parse(header.content + b"tensors", "x") == header


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"source_sha256": SOURCE},
        {"fingerprint": "A" * 64},
        {"fingerprint": FINGERPRINT[:-1]},
        {"fingerprint": FINGERPRINT, "host": "node7"},
    ],
    ids=str,
)
def test_a_header_with_other_metadata_is_no_record(metadata: dict[str, str]) -> None:
    content = encode_record({"a": np.zeros(1, np.float16)}, metadata)
    with pytest.raises(CorruptError, match="metadata"):
        RecordHeader.parse(content, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"latents": np.zeros((4, 8, 8), np.float32)},
        {"latents": np.zeros((4, 8, 16), np.float16)},
        {"extra": np.zeros(1, np.float16)},
    ],
    ids=["dtype", "shape", "name"],
)
def test_tensors_that_are_not_as_declared_are_not_encoded(change: dict) -> None:
    header = RecordHeader.build(latents_schema(), 64, 64, FINGERPRINT)
    tensors = {"latents": np.zeros((4, 8, 8), np.float16), "time_ids": np.zeros(6, np.int32)}
    assert header.encode(tensors)
    with pytest.raises(ValueError, match="expected"):
        header.encode(tensors | change)


def test_a_batch_is_encoded_as_its_records_are_one_by_one() -> None:
    header = RecordHeader.build(latents_schema(), 64, 96, FINGERPRINT)
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((3, 4, 8, 12)).astype(np.float16)
    time_ids = generator.integers(0, 2000, (3, 6)).astype(np.int32)
    columns_first = torch.from_numpy(latents.copy()).transpose(2, 3)  # not contiguous
    one_by_one = [
        header.encode({"latents": columns_first[row], "time_ids": time_ids[row]})
        for row in range(3)
    ]
    batch = {"latents": columns_first, "time_ids": time_ids}
    assert list(header.encode_batch(batch)) == one_by_one
    assert len(set(one_by_one)) == 3


def test_a_batch_of_tensors_of_different_lengths_is_not_encoded() -> None:
    header = RecordHeader.build(latents_schema(), 64, 64, FINGERPRINT)
    batch = {"latents": np.zeros((3, 4, 8, 8), np.float16), "time_ids": np.zeros((2, 6), np.int32)}
    with pytest.raises(ValueError, match="zip"):
        list(header.encode_batch(batch))


@pytest.mark.parametrize("schema", [SDXL_FULL, latents_schema(16), text_schema(77, 2048, 1280)])
def test_a_schema_survives_json(schema: RecordSchema) -> None:
    assert RecordSchema.from_json(json.loads(json.dumps(schema.to_json())), "x") == schema


@pytest.mark.parametrize("num_tensors", [1, 32])
def test_a_schema_may_have_one_to_thirty_two_tensors(num_tensors: int) -> None:
    schema = RecordSchema(tuple(TensorSpec(f"t{n}", "F16", (1,)) for n in range(num_tensors)))
    assert RecordSchema.from_json(schema.to_json(), "x") == schema


def test_a_schema_of_more_tensors_is_refused_though_no_name_is_there_twice() -> None:
    schema = RecordSchema(tuple(TensorSpec(f"t{n}", "F16", (1,)) for n in range(33)))
    with pytest.raises(CorruptError, match="1 to 32"):
        RecordSchema.from_json(schema.to_json(), "x")


SPEC = TensorSpec("mask", "F16", (1, "H/8", "W/8"))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        [{"name": "a", "dtype": "F16"}],
        RecordSchema((SPEC, SPEC)).to_json(),
        RecordSchema((SPEC,) * 33).to_json(),
        *(
            [{**RecordSchema((SPEC,)).to_json()[0], **change}]
            for change in (
                {"name": "../a"},
                {"name": 7},
                {"dtype": "U8"},
                {"dtype": ["F16"]},
                {"shape": []},
                {"shape": [0]},
                {"shape": [2**40]},
                {"shape": [True]},
                {"shape": ["H/4"]},
                {"shape": [[1]]},
                {"shape": 3},
                {"extra": 1},
            )
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_stranger_schema_is_refused(value: object) -> None:
    with pytest.raises(CorruptError):
        RecordSchema.from_json(value, "x")
