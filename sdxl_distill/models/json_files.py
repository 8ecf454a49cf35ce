"""The JSON files of a checkpoint: bounded in size, an object each, no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.storage.regular_file import read_bytes

MAX_JSON_BYTES = 16 << 20
"""The largest is the index of a sharded network, a few hundred KiB."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ConfigError: when there is no such file.
        CorruptError: when it is too large or not a JSON object.
        StorageError: when the operating system refuses.
    """
    try:
        content = read_bytes(path, MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {path.name}",
            expected="a complete folder in diffusers' layout",
            where=str(path.parent),
            action="check the path, or save the whole pipeline again with `save_pretrained`",
        ) from error
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the bytes of one JSON object.

    Raises:
        CorruptError: when they are not JSON, not an object, or a key occurs twice.
    """
    try:
        parsed = json.loads(content, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorruptError(
            f"JSON that cannot be read ({error})",
            where=str(path),
            action="copy or download this folder again",
        ) from error
    if not isinstance(parsed, dict):
        raise CorruptError(
            f"a JSON {type(parsed).__name__}", expected="a JSON object", where=str(path)
        )
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key occurs twice")
    return unique
