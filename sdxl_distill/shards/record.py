"""A record: the tensors of one image in one set, as the bytes of one safetensors file.

A set declares its records by a `RecordSchema`, whose shapes may depend on the bucket. All records
of a shard share their header bytes: `RecordHeader`. See docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Final, Literal, TypeAlias, cast

import torch

from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_LENGTH, MAX_RANK, MAX_RECORD_BYTES, MAX_TENSORS
from sdxl_distill.shards.bounded_json import require_names, shown
from sdxl_distill.shards.safetensors_layout import (
    ITEM_BYTES,
    TORCH_DTYPES,
    AnyTensor,
    SafetensorsHeader,
    TensorPlace,
    build_header,
    dtype_of,
    join_batches,
    join_tensors,
    parse_header,
)

Layout: TypeAlias = Literal["full", "compact"]
ResolvedTensors: TypeAlias = "dict[str, tuple[str, tuple[int, ...]]]"

STORED_DTYPES: Final = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""The dtypes of stored predictions: a configuration's spelling → a schema's."""
RECORD_DTYPES: Final = ("F16", "BF16", "F32", "I32", "I64")
FINGERPRINT: Final = "fingerprint"
SOURCE_SHA256: Final = "source_sha256"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_TENSOR_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SIDES: Final = ("H/8", "W/8")
_FLOATS: Final = ("F16", "BF16", "F32")
# For every tensor that readers know by name: its dtypes and shape, None for any length.
_FORMS: Final[Mapping[str, tuple[tuple[str, ...], tuple[int | str | None, ...]]]] = {
    "encoder_hidden_states": (("F16",), (None, None)),
    "latents": (("F16",), (None, *_SIDES)),
    "noise": (("F16",), (None, *_SIDES)),
    "pooled_embeds": (("F16",), (None,)),
    "resolution": (("I32",), (2,)),
    "seed": (("I64",), (1,)),
    "teacher_pred": (_FLOATS, (None, *_SIDES)),
    "time_ids": (("I32",), (6,)),
    "timestep": (("I64",), (1,)),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a schema: lengths are numbers, or `"H/8"`, `"W/8"` of the bucket."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class RecordSchema:
    """Which tensors every record of a set has."""

    tensors: tuple[TensorSpec, ...]

    def resolve(self, width: int, height: int) -> ResolvedTensors:
        """Return name → (dtype, shape) for a bucket of `width` × `height` pixels."""
        lengths = {"H/8": height // 8, "W/8": width // 8}
        return {
            spec.name: (
                spec.dtype,
                tuple(lengths[size] if isinstance(size, str) else size for size in spec.shape),
            )
            for spec in self.tensors
        }

    def to_json(self) -> list[dict[str, Any]]:
        """Return the schema as it stands in `set.json` and in the manifest."""
        return [
            {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
            for spec in self.tensors
        ]

    @classmethod
    def from_json(cls, value: Any, where: str) -> RecordSchema:
        """Read a schema that may come from a stranger.

        Raises:
            CorruptError: for unknown dtypes, unsafe names, names given twice, lengths beyond the
                limits, and tensors that do not have the form that their names promise.
        """
        if not isinstance(value, list) or not 1 <= len(cast("list[Any]", value)) <= MAX_TENSORS:
            raise CorruptError(
                f"schema is {shown(value)}", expected=f"1 to {MAX_TENSORS} tensors", where=where
            )
        specs = tuple(_parse_spec(entry, where) for entry in cast("list[Any]", value))
        if len({spec.name for spec in specs}) != len(specs):
            raise CorruptError(
                "schema names a tensor twice", expected="each tensor once", where=where
            )
        schema = cls(specs)
        # Tried in the smallest bucket, to refuse a schema that fits none before it is used.
        forms = schema.resolve(8, 8).values()
        if sum(ITEM_BYTES[dtype] * prod(shape) for dtype, shape in forms) > MAX_RECORD_BYTES:
            raise CorruptError(
                "a schema of huge records",
                expected=f"at most {MAX_RECORD_BYTES} bytes a record",
                where=where,
            )
        return schema


@dataclass(frozen=True)
class RecordHeader:
    """The header that all records of one shard share, byte for byte.

    Attributes:
        content: the bytes in front of the tensors.
        places: the name, dtype, shape, offset in the record and size of each tensor, in file order.
        fingerprint: the set's fingerprint, 64 hex digits.
        source_sha256: the digest of the latents shard the records were made from; in a latents
            set that of the ids that were planned for the shard, None in those of earlier versions.
        record_bytes: the size of each record, header included.
    """

    content: bytes
    places: tuple[TensorPlace, ...]
    fingerprint: str
    source_sha256: str | None
    record_bytes: int

    @classmethod
    def build(
        cls,
        schema: RecordSchema,
        width: int,
        height: int,
        fingerprint: str,
        source_sha256: str | None = None,
    ) -> RecordHeader:
        """Return the header of a shard's records from what determines it.

        Raises:
            CorruptError: when such a record would be larger than 64 MiB.
        """
        metadata = {FINGERPRINT: fingerprint}
        if source_sha256 is not None:
            metadata[SOURCE_SHA256] = source_sha256
        return cls._of(build_header(schema.resolve(width, height), metadata))

    @classmethod
    def parse(cls, content: bytes, where: str) -> RecordHeader:
        """Read the header at the start of a record, an index's common header or a loose file.

        Raises:
            CorruptError: when it is not byte for byte what `build` writes for some schema.
        """
        header = parse_header(content, where)
        if not _are_record_metadata(header.metadata):
            raise CorruptError(
                "the record's metadata are not those of a record",
                expected="fingerprint and, except for some latents, source_sha256",
                where=where,
            )
        for place in header.places:
            if place.dtype not in RECORD_DTYPES:
                raise CorruptError(
                    f"tensor {shown(place.name)} has dtype {place.dtype}",
                    expected=" | ".join(RECORD_DTYPES),
                    where=where,
                )
        return cls._of(header)

    @classmethod
    def _of(cls, header: SafetensorsHeader) -> RecordHeader:
        if header.num_bytes > MAX_RECORD_BYTES:
            raise CorruptError(
                f"tensors that make records of {header.num_bytes} bytes",
                expected=f"at most {MAX_RECORD_BYTES}",
                where="record schema",
                action="no set of such records can be read; use smaller buckets, or the right "
                "checkpoint",
            )
        fingerprint = header.metadata[FINGERPRINT]
        source = header.metadata.get(SOURCE_SHA256)
        return cls(header.content, header.places, fingerprint, source, header.num_bytes)

    @property
    def recreates_noise(self) -> bool:
        """Whether records hold a seed in place of the noise (layout `compact`)."""
        names = {place.name for place in self.places}
        return {"seed", "teacher_pred"} <= names and "noise" not in names

    def place(self, tensor_name: str) -> TensorPlace:
        """Return where a tensor lies in a record; KeyError when the schema does not have it."""
        return self.places[self.column(tensor_name)]

    def column(self, tensor_name: str) -> int:
        """Return the column of a tensor in an index's digests; KeyError for an unknown tensor."""
        return self._columns[tensor_name]

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {place.name: column for column, place in enumerate(self.places)}

    def encode(self, tensors: Mapping[str, AnyTensor]) -> bytes:
        """Return the bytes of one record; ValueError when a tensor is not as declared."""
        return join_tensors(self.content, self.places, tensors)

    def encode_batch(self, tensors: Mapping[str, AnyTensor]) -> Iterator[bytes]:
        """Yield the bytes of B records from their tensors [B, …]; ValueError as `encode`."""
        return join_batches(self.content, self.places, tensors)

    def decode(self, record: bytearray | memoryview) -> dict[str, torch.Tensor]:
        """Return the tensors in one record's bytes, without a copy."""
        tensors: dict[str, torch.Tensor] = {}
        for place in self.places:
            dtype = TORCH_DTYPES[place.dtype]
            flat = torch.frombuffer(
                record, dtype=dtype, count=prod(place.shape), offset=place.offset
            )
            tensors[place.name] = flat.reshape(place.shape)
        return tensors


def encode_record(tensors: Mapping[str, AnyTensor], metadata: Mapping[str, str]) -> bytes:
    """Return deterministic safetensors bytes of numpy arrays or CPU tensors of any shape."""
    shapes = {name: (dtype_of(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    header = build_header(shapes, metadata)
    return join_tensors(header.content, header.places, tensors)


def latents_schema(num_channels: int = 4) -> RecordSchema:
    """Return the schema of a latents set: scaled latents and micro-conditioning."""
    return RecordSchema(
        (
            TensorSpec("latents", "F16", (num_channels, "H/8", "W/8")),
            TensorSpec("time_ids", "I32", (6,)),
        )
    )


def text_schema(num_tokens: int, hidden_size: int, pooled_size: int) -> RecordSchema:
    """Return the schema of a text set: hidden states [T, D] and pooled embedding [P]."""
    return RecordSchema(
        (
            TensorSpec("encoder_hidden_states", "F16", (num_tokens, hidden_size)),
            TensorSpec("pooled_embeds", "F16", (pooled_size,)),
        )
    )


def predictions_schema(
    layout: Layout,
    dtype: str,
    num_channels: int,
    num_tokens: int,
    hidden_size: int,
    pooled_size: int,
) -> RecordSchema:
    """Return the schema of a predictions set; `dtype` is the prediction's: F16, BF16 or F32."""
    image: Sequence[int | str] = (num_channels, "H/8", "W/8")
    tensors = (
        TensorSpec("teacher_pred", dtype, tuple(image)),
        TensorSpec("timestep", "I64", (1,)),
        TensorSpec("seed", "I64", (1,)),
        TensorSpec("resolution", "I32", (2,)),
    )
    if layout == "full":
        text = text_schema(num_tokens, hidden_size, pooled_size)
        tensors += (TensorSpec("noise", "F16", tuple(image)), *text.tensors)
    return RecordSchema(tensors)


def _parse_spec(value: Any, where: str) -> TensorSpec:
    fields = require_names(value, {"name", "dtype", "shape"}, where)
    name, dtype, shape = fields["name"], fields["dtype"], fields["shape"]
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise CorruptError(
            f"schema has a tensor with the name {shown(name)}",
            expected="lower-case letters, digits and _",
            where=where,
        )
    if dtype not in RECORD_DTYPES:
        raise CorruptError(
            f"schema has tensor {name} with dtype {shown(dtype)}",
            expected=" | ".join(RECORD_DTYPES),
            where=where,
        )
    sizes = tuple(cast("list[Any]", shape)) if isinstance(shape, list) else ()
    if not 1 <= len(sizes) <= MAX_RANK or not all(map(_is_length, sizes)):
        raise CorruptError(
            f"schema has tensor {name} with shape {shown(shape)}",
            expected=f"1 to {MAX_RANK} lengths, each from 1 to {MAX_LENGTH}, H/8 or W/8",
            where=where,
        )
    if not _has_form_of_its_name(name, dtype, sizes):
        raise CorruptError(
            f"schema has tensor {name} as {dtype} {list(sizes)}",
            expected="its form in docs/format.md; optional tensors have names of their own",
            where=where,
        )
    return TensorSpec(name, dtype, sizes)


def _is_length(size: Any) -> bool:
    return size in _SIDES or (type(size) is int and 1 <= size <= MAX_LENGTH)


def _has_form_of_its_name(name: str, dtype: str, sizes: tuple[int | str, ...]) -> bool:
    if name not in _FORMS:
        return True
    dtypes, lengths = _FORMS[name]
    return (
        dtype in dtypes
        and len(sizes) == len(lengths)
        and all(
            size == length or (length is None and type(size) is int)
            for size, length in zip(sizes, lengths, strict=True)
        )
    )


def _are_record_metadata(metadata: dict[str, str]) -> bool:
    return (
        FINGERPRINT in metadata
        and metadata.keys() <= {FINGERPRINT, SOURCE_SHA256}
        and all(_SHA256.fullmatch(digest) for digest in metadata.values())
    )
