"""Safetensors bytes: the library is the oracle, strangers' headers are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from sdxl_distill.errors import CorruptError
from sdxl_distill.shards.record import encode_record
from sdxl_distill.shards.safetensors_layout import (
    TORCH_DTYPES,
    build_header,
    byte_view,
    dtype_of,
    parse_header,
)

TENSORS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
    st.tuples(
        st.sampled_from(sorted(TORCH_DTYPES)),
        st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=6,
)


def random_tensors(shapes: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 200, shape, generator=generator).to(TORCH_DTYPES[dtype])
        for name, (dtype, shape) in shapes.items()
    }


@settings(max_examples=100, deadline=None)
@given(TENSORS)
def test_bytes_equal_those_of_the_library_where_it_is_deterministic(shapes: dict) -> None:
    tensors = random_tensors(shapes)
    metadata = {"fingerprint": "x"}
    assert encode_record(tensors, metadata) == safetensors.torch.save(tensors, metadata)


def test_the_library_reads_what_has_several_metadata_entries() -> None:
    tensors = {"b": torch.randn(2, 3, dtype=torch.bfloat16), "a": torch.arange(4)}
    read = safetensors.torch.load(encode_record(tensors, {"z": "1", "a": "2", "m": "3"}))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_numpy_and_torch_give_the_same_bytes() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    assert encode_record({"a": array}, {}) == encode_record({"a": torch.from_numpy(array)}, {})


def test_a_transposed_tensor_is_stored_as_it_reads() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3).T
    read = safetensors.torch.load(encode_record({"a": tensor}, {}))["a"]
    assert torch.equal(read, tensor)


@settings(max_examples=50, deadline=None)
@given(TENSORS)
def test_a_parsed_header_says_where_each_tensor_lies(shapes: dict) -> None:
    tensors = random_tensors(shapes)
    content = encode_record(tensors, {"k": "v"})
    header = parse_header(content, "x")
    assert header.metadata == {"k": "v"}
    assert header.num_bytes == len(content)
    for place in header.places:
        assert (place.dtype, place.shape) == (
            dtype_of(tensors[place.name]),
            tensors[place.name].shape,
        )
        stored = content[place.offset : place.offset + place.num_bytes]
        assert stored == bytes(byte_view(tensors[place.name]))


def test_no_flipped_byte_leaves_the_header_what_it_was() -> None:
    content = build_header({"a": ("F16", (2, 3)), "b": ("I64", (1,))}, {"k": "v"}).content
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        try:
            parsed = parse_header(bytes(flipped), "x").content
        except CorruptError:
            continue
        assert parsed != content


def wrapped(text: str | bytes) -> bytes:
    body = text.encode() if isinstance(text, str) else text
    return len(body).to_bytes(8, "little") + body


ENTRY = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
ATTACKS = {
    "empty": b"",
    "length beyond the file": (100).to_bytes(8, "little") + b"{}",
    "length of exabytes": b"\xff" * 8 + b"{}",
    "no JSON": wrapped("nonsense"),
    "no object": wrapped("[1]     "),
    "no UTF-8": wrapped(b"\xff" * 8),
    "no metadata": wrapped(json.dumps({"a": ENTRY})),
    "white space": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY})),
    "name twice": wrapped('{"__metadata__":{},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
                          '"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'),
    "NaN": wrapped('{"__metadata__":{"a":NaN}}'),
    "infinite number": wrapped('{"__metadata__":{"a":1e999}}'),
    "metadata that is no text": wrapped('{"__metadata__":{"a":17}}    '),
    "deep nesting": wrapped("[" * 60_000),
    "gap": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"data_offsets": [2, 6]}},
                              separators=(",", ":"))),
    "overflow": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"shape": [0, 2**60]}},
                                   separators=(",", ":"))),
    "negative length": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"shape": [-2]}},
                                          separators=(",", ":"))),
    "shape of truth": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"shape": [True]}},
                                         separators=(",", ":"))),
    "unknown dtype": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"dtype": "F8"}},
                                        separators=(",", ":"))),
    "dtype that is no text": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"dtype": []}},
                                                separators=(",", ":"))),
    "extra field": wrapped(json.dumps({"__metadata__": {}, "a": ENTRY | {"x": 1}},
                                      separators=(",", ":"))),
}  # fmt: skip


@pytest.mark.parametrize("content", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_stranger_header_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptError):
        parse_header(content + bytes(64), "x")


def test_a_header_of_100_megabytes_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(CorruptError, match="too long"):
        parse_header(wrapped(" " * 100_000_000), "x")


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3).T, np.zeros((2, 3)).T])
def test_memory_that_is_not_contiguous_is_no_buffer(tensor: torch.Tensor | np.ndarray) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        byte_view(tensor)
