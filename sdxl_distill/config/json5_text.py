"""Reading JSON with comments (JSON5): bounded, and with no key given twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import json5

from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.limits import MAX_CONFIG_BYTES
from sdxl_distill.storage.regular_file import read_bytes

_PLACE = re.compile(r"<string>:(\d+) ")


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object as written, repeated keys included."""


def json_path(location: Sequence[str | int]) -> str:
    """Write a place in a JSON document as `teachers[1].weight`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part and not set(part) & set(".[]\"' "):
            path += f".{part}" if path else part
        else:
            path += f"[{part!r}]"
    return path


def parse_json5(text: str) -> tuple[Any, list[str]]:
    """Parse JSON5 text.

    Returns:
        The value, and the JSON path of every key that its object holds more than once.

    Raises:
        ValueError: when the text is not JSON5, or nested too deeply to be a configuration.
    """
    try:
        value = json5.loads(text, object_pairs_hook=cast("Any", _Object))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    twins: list[str] = []
    return _plain(value, (), twins), twins


def _plain(value: Any, location: tuple[str | int, ...], twins: list[str]) -> Any:
    if isinstance(value, _Object):
        tree: dict[str, Any] = {}
        for key, child in cast("Iterable[tuple[str, Any]]", value):
            if key in tree:
                twins.append(json_path((*location, key)))
            tree[key] = _plain(child, (*location, key), twins)
        return tree
    if isinstance(value, list):
        children = cast("list[Any]", value)
        return [_plain(child, (*location, n), twins) for n, child in enumerate(children)]
    return value


def read_json5(path: Path) -> Any:
    """Read and parse a JSON5 file of at most `MAX_CONFIG_BYTES`.

    Raises:
        ConfigError: when it is missing, not a regular file, too large, not UTF-8 or not JSON5, or
            holds a key twice.
        StorageError: when it cannot be read.
    """
    # What is wrong with the file is wrong with the configuration: ConfigError, not CorruptError.
    try:
        text = read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8-sig")
        value, twins = parse_json5(text)
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no such file", where=str(path), action="check the path after --config"
        ) from error
    except CorruptError as error:
        raise ConfigError(
            error.found,
            expected=error.expected,
            where=str(path),
            action="name a configuration file after --config",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"byte {error.start} is not UTF-8", expected="UTF-8 text", where=str(path)
        ) from error
    except ValueError as error:
        place = _PLACE.match(str(error))
        raise ConfigError(
            str(error)[place.end() :] if place else str(error),
            expected="JSON; comments and trailing commas are allowed",
            where=f"{path}, line {place[1]}" if place else str(path),
        ) from error
    # json5 itself would keep the last of two equal keys and say nothing.
    if twins:
        raise ConfigError(
            f"{', '.join(twins)} is given more than once",
            expected="every key once",
            where=str(path),
            action="remove all but one",
        )
    return value
