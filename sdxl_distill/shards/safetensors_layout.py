"""Safetensors bytes that are a function of their tensors and metadata alone.

The safetensors library writes several metadata entries in random order, so the header is written
here, in the order and alignment it would use; https://github.com/huggingface/safetensors#format.
The strict parser accepts exactly what the writer writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_HEADER_BYTES
from sdxl_distill.shards.bounded_json import parse_json, require_names

# In the library's own order of dtypes; tensors are stored from the last to the first.
ITEM_BYTES: Final = {
    "U8": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
TORCH_DTYPES: Final = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_DTYPE_OF_TORCH: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_DTYPE_OF_NUMPY: Final = {
    np.dtype(np.uint8): "U8",
    np.dtype(np.int16): "I16",
    np.dtype(np.float16): "F16",
    np.dtype(np.int32): "I32",
    np.dtype(np.float32): "F32",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint64): "U64",
}
_DTYPE_RANK: Final = {dtype: rank for rank, dtype in enumerate(ITEM_BYTES)}
_LENGTH_BYTES: Final = 8
_METADATA: Final = "__metadata__"
_KEPT_LAYOUTS: Final = 256  # shards of the same bucket and number of records share one

_describe: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

AnyTensor: TypeAlias = "torch.Tensor | npt.NDArray[Any]"


class TensorPlace(NamedTuple):
    """Where one tensor lies in a safetensors file; `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsHeader(NamedTuple):
    """The bytes before the tensors, and what they say."""

    content: bytes
    places: tuple[TensorPlace, ...]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of the whole file, header included."""
        return len(self.content) + sum(place.num_bytes for place in self.places)


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> SafetensorsHeader:
    """Lay out tensors given as name → (dtype, shape): widest dtypes first, then by name.

    Without metadata, None, the header does not speak of any, as the library's own.
    """
    laid_out = _lay_out(tuple(tensors.items()))
    fields = laid_out.text[1:]
    if metadata is not None:
        fields = f'"{_METADATA}":{_describe(dict(sorted(metadata.items())))}{laid_out.text}'
    text = f"{{{fields}}}".encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    begin = len(content)
    places = tuple(
        TensorPlace(name, dtype, shape, begin + offset, num_bytes)
        for name, dtype, shape, offset, num_bytes in laid_out.places
    )
    return SafetensorsHeader(content, places, dict(metadata or {}))


class _LaidOut(NamedTuple):
    """The fields of tensors as they follow the metadata, and where they lie after the header."""

    text: str
    places: tuple[TensorPlace, ...]


@lru_cache(_KEPT_LAYOUTS)
def _lay_out(tensors: tuple[tuple[str, tuple[str, tuple[int, ...]]], ...]) -> _LaidOut:
    ordered = sorted(tensors, key=lambda entry: (-_DTYPE_RANK[entry[1][0]], entry[0]))
    fields: list[str] = []
    places: list[TensorPlace] = []
    begin = 0
    for name, (dtype, shape) in ordered:
        end = begin + ITEM_BYTES[dtype] * prod(shape)
        field = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        fields.append(f",{_describe(name)}:{_describe(field)}")
        places.append(TensorPlace(name, dtype, shape, begin, end - begin))
        begin = end
    return _LaidOut("".join(fields), tuple(places))


def parse_header(content: bytes, where: str) -> SafetensorsHeader:
    """Read the header at the start of `content`; anything may follow it.

    Raises:
        CorruptError: when it is larger than 64 KiB, cut short, or not byte for byte what
            `build_header` writes for the tensors and metadata that it names.
    """
    num_text_bytes = int.from_bytes(content[:_LENGTH_BYTES], "little")
    text = content[_LENGTH_BYTES : _LENGTH_BYTES + min(num_text_bytes, MAX_HEADER_BYTES)]
    if len(content) < _LENGTH_BYTES or len(text) != num_text_bytes:
        raise CorruptError(
            "the safetensors header is cut short or too long",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            where=where,
        )
    fields = parse_json(text, where, MAX_HEADER_BYTES)
    try:
        metadata: dict[str, str] = fields.pop(_METADATA)
        tensors = {name: _parse_tensor(field, where) for name, field in fields.items()}
        header = build_header(tensors, metadata)
        is_canonical = header.content == content[: len(header.content)]
        is_text = all(type(value) is str for value in metadata.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            "not a safetensors header of ours",
            expected="what build_header writes",
            where=where,
        ) from error
    if not (is_canonical and is_text):
        raise CorruptError(
            "the safetensors header is not in canonical form",
            expected="sorted names, gapless offsets, no white space",
            where=where,
        )
    return header


def join_tensors(
    content: bytes, places: Sequence[TensorPlace], tensors: Mapping[str, AnyTensor]
) -> bytes:
    """Return the header's bytes and the tensors, each in its place, as one file's bytes.

    Raises:
        ValueError: when a tensor is missing, unknown, or has another dtype or shape than its
            place: the caller's mistake, never the file's.
    """
    (joined,) = join_batches(content, places, {name: t[None] for name, t in tensors.items()})
    return joined


def join_batches(
    content: bytes, places: Sequence[TensorPlace], tensors: Mapping[str, AnyTensor]
) -> Iterator[bytes]:
    """Yield the bytes of B files that share a header, from their tensors [B, …].

    Checks once what `join_tensors` checks for every file.

    Raises:
        ValueError: as `join_tensors`, and when the tensors are not all of one length B.
    """
    names = sorted(place.name for place in places)
    if sorted(tensors) != names:
        raise ValueError(f"tensors {sorted(tensors)}, expected {names}")
    rows: list[list[memoryview]] = []
    for place in places:
        tensor = tensors[place.name]
        found = dtype_of(tensor), tuple(tensor.shape[1:])
        if found != (place.dtype, place.shape):
            raise ValueError(f"{place.name} is {found}, expected {(place.dtype, place.shape)}")
        view, size = byte_view(_contiguous(tensor)), place.num_bytes
        rows.append([view[row * size : (row + 1) * size] for row in range(len(tensor))])
    for parts in zip(*rows, strict=True):
        yield b"".join((content, *parts))


def dtype_of(tensor: AnyTensor) -> str:
    """Return the dtype in safetensors' spelling; KeyError for one that our files never have."""
    if isinstance(tensor, torch.Tensor):
        return _DTYPE_OF_TORCH[tensor.dtype]
    return _DTYPE_OF_NUMPY[tensor.dtype]


def byte_view(tensor: AnyTensor) -> memoryview:
    """Return the memory of a contiguous array or CPU tensor as bytes, without a copy.

    Raises:
        ValueError: when it is not contiguous.
    """
    if isinstance(tensor, torch.Tensor):
        _require(tensor.is_contiguous())
        return memoryview(cast("Any", tensor.detach().view(-1).view(torch.uint8).numpy()))
    _require(tensor.flags.c_contiguous)
    return memoryview(cast("Any", tensor).reshape(-1).view(np.uint8))


def _require(is_contiguous: bool) -> None:
    if not is_contiguous:
        raise ValueError("the tensor is not contiguous")


def _contiguous(tensor: AnyTensor) -> AnyTensor:
    if isinstance(tensor, torch.Tensor):
        return tensor.contiguous()
    return np.ascontiguousarray(tensor)


def _parse_tensor(field: Any, where: str) -> tuple[str, tuple[int, ...]]:
    fields = require_names(field, {"dtype", "shape", "data_offsets"}, where)
    shape = tuple(fields["shape"])
    if len(shape) > 8 or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError("shape")
    return fields["dtype"], shape
