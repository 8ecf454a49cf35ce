"""Image files of every sort, made by Pillow or byte by byte."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from PIL import Image


class EncodeImage(Protocol):
    def __call__(self, pixels: np.ndarray, image_format: str, **options: Any) -> bytes: ...


class BuildPng(Protocol):
    def __call__(
        self,
        width: int,
        height: int,
        depth: int,
        color_type: int,
        rows: bytes,
        *chunks: tuple[bytes, bytes],
        behind: tuple[tuple[bytes, bytes], ...] = (),
    ) -> bytes: ...


class WritePhoto(Protocol):
    def __call__(
        self, path: Path, seed: int, width: int = 48, height: int = 32, caption: str | None = None
    ) -> Path: ...


@pytest.fixture
def encode_image() -> EncodeImage:
    def encode(pixels: np.ndarray, image_format: str, **options: Any) -> bytes:
        file = BytesIO()
        Image.fromarray(pixels).save(file, image_format, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def build_png() -> BuildPng:
    """A PNG of raw rows (each with its filter byte), for what Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    def build(
        width: int,
        height: int,
        depth: int,
        color_type: int,
        rows: bytes,
        *chunks: tuple[bytes, bytes],
        behind: tuple[tuple[bytes, bytes], ...] = (),
    ) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
        pixels = (b"IDAT", zlib.compress(rows))
        parts = [(b"IHDR", header), *chunks, pixels, *behind, (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    return build


@pytest.fixture
def write_photo() -> WritePhoto:
    """Write a small PNG whose bytes depend on the seed alone, with a caption beside it."""

    def write(
        path: Path, seed: int, width: int = 48, height: int = 32, caption: str | None = None
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (height, width, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(path, "PNG")
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write
