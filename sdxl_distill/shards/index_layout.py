"""The `.idx` file as a safetensors file: which tensors and metadata it has, and nothing else.

`ShardIndex` knows what the numbers mean and checks that they agree.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sdxl_distill.errors import CorruptError, IncompatibleError
from sdxl_distill.limits import MAX_RECORDS
from sdxl_distill.shards.safetensors_layout import (
    SafetensorsHeader,
    build_header,
    dtype_of,
    join_tensors,
    parse_header,
)

INDEX_FORMAT_VERSION: Final = 1
ACTION: Final = "rebuild this shard: run its builder with --repair"

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_METADATA: Final = {
    "digest": _SHA256,
    "fingerprint": _SHA256,
    "format_version": re.compile(r"[1-9][0-9]{0,3}"),
    "num_records": re.compile(r"0|[1-9][0-9]{0,4}"),
    "tar_bytes": re.compile(r"[1-9][0-9]{0,10}"),
    "tar_sha256": _SHA256,
}
_NO_DIGEST: Final = b"0" * 64
# After the header's length; "digest" is the first of the metadata's sorted names.
_DIGEST_BEGIN: Final = 8 + len(b'{"__metadata__":{"digest":"')
_DIGEST_END: Final = _DIGEST_BEGIN + len(_NO_DIGEST)
_NUMPY_DTYPES: Final = {"U8": np.dtype("u1"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8")}


def encode_index(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of an index file, the format version added."""
    shapes = {name: (dtype_of(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    header = build_header(shapes, {**metadata, "format_version": str(INDEX_FORMAT_VERSION)})
    return join_tensors(header.content, header.places, tensors)


def index_bytes(
    num_records: int, tar_bytes: int, header_bytes: int, num_tensors: int, *, has_noise: bool
) -> int:
    """Return the size of an index file, from what a manifest and a schema say about its shard."""
    digest = _NO_DIGEST.decode()
    metadata = {
        "digest": digest,
        "fingerprint": digest,
        "format_version": str(INDEX_FORMAT_VERSION),
        "num_records": str(num_records),
        "tar_bytes": str(tar_bytes),
        "tar_sha256": digest,
    }
    return build_header(
        _shapes(num_records, header_bytes, num_tensors, has_noise), metadata
    ).num_bytes


def own_digest(content: bytes) -> str:
    """Return the SHA-256 of an index file's bytes, with 64 zeros in place of the digest in it."""
    state = hashlib.sha256(content[:_DIGEST_BEGIN])
    state.update(_NO_DIGEST)
    state.update(memoryview(content)[_DIGEST_END:])
    return state.hexdigest()


def parse_index(content: bytes, where: str) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Return metadata and tensors of an index file; names, dtypes and shapes are checked.

    Raises:
        CorruptError: when one is missing, unknown, too large or of another dtype or shape.
        IncompatibleError: when a newer version wrote the file.
    """
    layout = parse_header(content, where)
    _check_metadata(layout.metadata, where)
    num_records = int(layout.metadata["num_records"])
    if num_records > MAX_RECORDS or len(content) != layout.num_bytes:
        raise CorruptError(
            f"{len(content)} bytes for {num_records} records",
            expected=f"{layout.num_bytes} bytes and at most {MAX_RECORDS} records",
            where=where,
            action=ACTION,
        )
    found = {place.name: (place.dtype, place.shape) for place in layout.places}
    if found != _expected_tensors(layout, num_records):
        raise CorruptError(
            "other tensors than those of an index",
            expected="those of docs/format.md",
            where=where,
            action=ACTION,
        )
    return layout.metadata, _tensors(content, layout)


def known_index(
    content: bytes,
    metadata: Mapping[str, str],
    header_bytes: int,
    num_tensors: int,
    *,
    has_noise: bool,
) -> dict[str, npt.NDArray[Any]] | None:
    """Return the tensors of an index file whose header is predicted; None when it has another.

    Nothing is parsed: the bytes that the header must have are built and compared.

    Args:
        content: the bytes of the file.
        metadata: the metadata that it must have, all but the format version.
        header_bytes: the size of the records' common header.
        num_tensors: the number of tensors in each record.
        has_noise: True when it has digests of noise that is not stored.
    """
    shapes = _shapes(int(metadata["num_records"]), header_bytes, num_tensors, has_noise)
    layout = build_header(shapes, {**metadata, "format_version": str(INDEX_FORMAT_VERSION)})
    if len(content) != layout.num_bytes or not content.startswith(layout.content):
        return None
    return _tensors(content, layout)


def _tensors(content: bytes, layout: SafetensorsHeader) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {}
    for place in layout.places:
        dtype = _NUMPY_DTYPES[place.dtype]
        flat = np.frombuffer(content, dtype, place.num_bytes // dtype.itemsize, place.offset)
        tensors[place.name] = np.reshape(flat, place.shape)
    return tensors


def _check_metadata(metadata: dict[str, str], where: str) -> None:
    version = metadata.get("format_version", "")
    if _METADATA["format_version"].fullmatch(version) and int(version) > INDEX_FORMAT_VERSION:
        raise IncompatibleError(
            f"an index of format version {version}",
            expected=f"at most {INDEX_FORMAT_VERSION}",
            where=where,
            action="install a newer sdxl_distill",
        )
    if metadata.keys() != _METADATA.keys() or not all(
        _METADATA[name].fullmatch(text) for name, text in metadata.items()
    ):
        raise CorruptError("the metadata are not those of an index", where=where, action=ACTION)


def _expected_tensors(
    layout: SafetensorsHeader, num_records: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    last_length = {place.name: place.shape[-1] for place in layout.places if place.shape}
    lengths = last_length.get("common_header", 0), last_length.get("digests", 0)
    return _shapes(num_records, *lengths, "noise_digests" in last_length)


def _shapes(
    num_records: int, header_bytes: int, num_tensors: int, has_noise: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "common_header": ("U8", (header_bytes,)),
        "digests": ("U64", (num_records, num_tensors)),
        "ids": ("U8", (num_records, 16)),
        "offsets": ("I64", (num_records,)),
        "rest_digests": ("U64", (num_records,)),
        "sidecar_sizes": ("I64", (num_records,)),
        "sizes": ("I64", (num_records,)),
    }
    if has_noise:
        shapes["noise_digests"] = ("U64", (num_records,))
    return shapes
