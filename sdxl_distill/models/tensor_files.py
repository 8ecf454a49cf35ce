"""The safetensors files of one component folder, in one file or sharded, in any precision.

Headers are not trusted: they are bounded, and must describe every byte of their file exactly
once. Tensors are read one at a time with plain reads, since a mapped file that is cut while in
use kills the process. The digests do not depend on how tensors are spread over files.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.models.json_files import parse_json, read_json
from sdxl_distill.storage.regular_file import open_regular, storage_errors

MAX_HEADER_BYTES = 16 << 20
_READ_BYTES = 4 << 20
_NUM_HASHING_THREADS = 8
_VARIANTS = ("", ".fp16", ".bf16")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack"}
_LENGTH_BYTES = 8

FLOAT_TYPES: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_INFINITY_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0 << 48}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in FLOAT_TYPES.items()} | {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        path: the safetensors file.
        dtype: its name in safetensors, "F16".
        shape: its extents.
        offset: the position of its first byte in the file.
        num_bytes: its size.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def stored_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """List the tensors of a component folder by name, reading headers only.

    Args:
        folder: a component's folder, `unet`.
        stem: `diffusion_pytorch_model` or `model`, its library's name for the file.

    Raises:
        ConfigError: when there are no safetensors weights, only pickled ones, or two choices.
        CorruptError: for a damaged header or index.
        IncompatibleError: for a data type that safetensors does not define.
    """
    weights = _weights_file(folder, stem)
    if weights.suffix != ".json":
        return read_header(weights)
    weight_map = _read_weight_map(weights)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        header = read_header(folder / file_name)
        declared = {name for name, place in weight_map.items() if place == file_name}
        if header.keys() != declared:
            raise CorruptError(
                f"{file_name} does not hold the tensors that the index lists",
                expected=name_list(header.keys() ^ declared) + " in both or in neither",
                where=str(weights),
                action="copy or download this folder again",
            )
        tensors |= header
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file, strictly.

    Raises:
        CorruptError: when it is cut, too large, malformed, or leaves a byte of the file out.
        IncompatibleError: for an unknown data type.
    """
    # The header, within its bounds.
    try:
        descriptor = open_regular(path)
    except FileNotFoundError as error:
        raise _corrupt(path, "the file is missing", "the file that the index names") from error
    with os.fdopen(descriptor, "rb") as file, storage_errors(path):
        file_bytes = os.fstat(descriptor).st_size
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
            raise _corrupt(
                path,
                f"a header of {header_bytes} bytes in a file of {file_bytes}",
                f"1 to {MAX_HEADER_BYTES} bytes, inside the file",
            )
        header = file.read(header_bytes)
    # Its tensors, which fill the rest of the file without a gap.
    entries = parse_json(header, path)
    entries.pop("__metadata__", None)
    first = _LENGTH_BYTES + header_bytes
    tensors = {name: _stored_tensor(path, name, entry, first) for name, entry in entries.items()}
    end = first
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise _corrupt(path, f"a gap or an overlap at byte {end}", "tensors side by side")
        end += tensor.num_bytes
    if end != file_bytes:
        raise _corrupt(path, f"{file_bytes} bytes", f"{end} bytes")
    return tensors


def read_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) in the order of the bytes on disk, one tensor in memory at a time.

    Raises:
        CorruptError: when a file is shorter than its header was.
        IncompatibleError: when tensors are not floating point: quantised weights.
    """
    unreadable = [name for name, tensor in tensors.items() if tensor.dtype not in FLOAT_TYPES]
    if unreadable:
        stored = tensors[unreadable[0]]
        raise IncompatibleError(
            f"{len(unreadable)} tensors are stored as {stored.dtype}: {name_list(unreadable)}",
            expected=" | ".join(FLOAT_TYPES),
            where=str(stored.path.parent),
            action="use the weights before they were quantised",
        )
    by_place = sorted(tensors, key=lambda name: (tensors[name].path, tensors[name].offset))
    for name in by_place:
        yield name, read_tensor(tensors[name])


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read one tensor of floats. Raises CorruptError as `read_tensors`."""
    content = torch.empty(stored.num_bytes, dtype=torch.uint8)
    view = content.numpy()
    for chunk, offset in _chunks(stored):
        view[offset : offset + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
    return content.view(FLOAT_TYPES[stored.dtype]).view(stored.shape)


class TensorDigest(NamedTuple):
    """What reading a tensor once finds out.

    Attributes:
        sha256: the SHA-256 of its bytes, 64 hex digits.
        is_finite: False if an element is NaN or infinite, which some types do not have.
    """

    sha256: str
    is_finite: bool


def tensor_digests(tensors: Mapping[str, StoredTensor]) -> dict[str, TensorDigest]:
    """Read each tensor once, in a few MiB of memory.

    Raises:
        CorruptError: when a file is shorter than its header was.
    """
    with ThreadPoolExecutor(_NUM_HASHING_THREADS) as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def name_list(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names in order, and how many more there are, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _weights_file(folder: Path, stem: str) -> Path:
    """Return the one file to start from: full precision before half, never a choice of two."""
    for variant in _VARIANTS:
        names = (
            f"{stem}{variant}.safetensors",
            f"{stem}{variant}.safetensors.index.json",
            f"{stem}.safetensors.index{variant}.json",
        )
        found = sorted({name for name in names if (folder / name).exists()})
        if len(found) > 1:
            raise ConfigError(
                f"both {found[0]} and {found[1]} are there",
                expected="the weights once",
                where=str(folder),
                action="remove the one that is out of date",
            )
        if found:
            return folder / found[0]
    with storage_errors(folder):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise ConfigError(
            f"only pickled weights are there ({pickled[0]}), which can run code when loaded",
            expected=f"{stem}.safetensors",
            where=str(folder),
            action="if you trust them, load the pipeline and save it again with "
            "`save_pretrained(folder, safe_serialization=True)`",
        )
    raise ConfigError("no weights", expected=f"{stem}.safetensors", where=str(folder))


def _read_weight_map(path: Path) -> dict[str, str]:
    content = read_json(path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _corrupt(path, "no weight_map", "a JSON object of tensor names and file names")
    for place in weight_map.values():
        plain = isinstance(place, str) and Path(place).name == place
        if not plain or not place.endswith(".safetensors"):
            raise _corrupt(path, f"the file name {place!r}", "a safetensors file next to the index")
    return weight_map


def _stored_tensor(path: Path, name: str, entry: Any, first: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            len(entry) == 3 and all(type(extent) is int and extent >= 0 for extent in shape)
        ):
            pass
        case _:
            raise _corrupt(path, f"a malformed entry for {name!r}", "dtype, shape, data_offsets")
    if dtype not in _ITEM_BYTES:
        raise IncompatibleError(
            f"{name!r} is of type {dtype}", expected=" | ".join(FLOAT_TYPES), where=str(path)
        )
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if begin < 0 or end - begin != num_bytes:
        raise _corrupt(path, f"{name!r} at bytes {begin} to {end}", f"{num_bytes} bytes")
    return StoredTensor(path, dtype, tuple(shape), first + begin, num_bytes)


def _digest(stored: StoredTensor) -> TensorDigest:
    digest, is_finite = hashlib.sha256(), True
    for chunk, _ in _chunks(stored):
        digest.update(chunk)
        is_finite = is_finite and _is_finite(chunk, stored.dtype)
    return TensorDigest(digest.hexdigest(), is_finite)


def _is_finite(chunk: bytes, dtype: str) -> bool:
    """Whether no float is NaN or infinite, which have every bit of the exponent set.

    Compares the largest bit patterns of either sign, at a twentieth of the cost of hashing.
    """
    if dtype not in _INFINITY_BITS:
        return True
    infinity, num_bytes = _INFINITY_BITS[dtype], _ITEM_BYTES[dtype]
    sign = 1 << (8 * num_bytes - 1)
    unsigned = np.frombuffer(chunk, np.dtype(f"<u{num_bytes}"))
    signed = unsigned.view(f"<i{num_bytes}")
    return int(signed.max()) < infinity and int(unsigned.max()) < sign | infinity


def _chunks(stored: StoredTensor) -> Iterator[tuple[bytes, int]]:
    """Yield the tensor's bytes in pieces of whole elements, each with its offset in the tensor."""
    with os.fdopen(open_regular(stored.path), "rb") as file, storage_errors(stored.path):
        file.seek(stored.offset)
        for offset in range(0, stored.num_bytes, _READ_BYTES):
            num_bytes = min(_READ_BYTES, stored.num_bytes - offset)
            chunk = file.read(num_bytes)
            if len(chunk) < num_bytes:
                raise _corrupt(stored.path, "the file was cut while it was read")
            yield chunk, offset


def _corrupt(path: Path, found: str, expected: str | None = None) -> CorruptError:
    return CorruptError(
        found, expected=expected, where=str(path), action="copy or download this folder again"
    )
