"""Captions next to images: `{stem}.txt`, `{stem}.caption` or `metadata.jsonl`, in that order.

A caption file wins if there is one, even an empty one. Of several `metadata.jsonl` on the way up
to the image folder, the nearest that names the image counts (the convention of Hugging Face's
imagefolder). An image without any of these has the empty caption.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from sdxl_distill.errors import CorruptError
from sdxl_distill.limits import MAX_CAPTION_BYTES, MAX_METADATA_BYTES
from sdxl_distill.storage import regular_file

CAPTION_SUFFIXES: Final = (".txt", ".caption")
METADATA_NAME: Final = "metadata.jsonl"
CAPTION_FIELDS: Final = ("text", "caption", "prompt", "description", "caption_text", "txt")
_MAX_FIELDS: Final = 100


def caption_name(image_name: str, names: Collection[str]) -> str | None:
    """Return the name of an image's caption file among the names of its folder, or None."""
    stem = posixpath.splitext(image_name)[0]
    return next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in names), None)


def read_caption(path: Path) -> str:
    """Return the text of a caption file without white space around it.

    Raises:
        CorruptError: when it is gone, not UTF-8 or larger than `MAX_CAPTION_BYTES`.
        StorageError: when the disk refuses.
    """
    return _read_utf8(path, MAX_CAPTION_BYTES).strip()


def read_metadata(path: Path, fields: set[str] | None = None) -> dict[str, str]:
    """Return caption by file name, relative to the folder of this `metadata.jsonl`.

    The first of `CAPTION_FIELDS` that a line has counts; a line without any, or with null
    there, means the empty caption.

    Args:
        path: the file.
        fields: a set that receives the names of fields other than `file_name`, at most a hundred.

    Raises:
        CorruptError: for a line that is not JSON or names no file, for a caption of more than
            1 MiB, for two captions of one file, and as `read_caption`.
        StorageError: when the disk refuses.
    """
    captions: dict[str, str] = {}
    lines = _read_utf8(path, MAX_METADATA_BYTES).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        name, caption, names = _metadata_line(line, where)
        if fields is not None and len(fields) < _MAX_FIELDS:
            fields |= names
        if captions.setdefault(name, caption) != caption:
            raise CorruptError(f"a second caption for {name!r}", expected="one", where=where)
    return captions


def metadata_caption(source: str, metadata: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return the caption that the nearest `metadata.jsonl` above an image gives it, or None.

    Args:
        source: the image's path, relative to the image folder, with slashes.
        metadata: results of `read_metadata`, by folder in the same form (the top is "").
    """
    folder = source
    while folder:
        folder = posixpath.dirname(folder)
        name = source[len(folder) + 1 :] if folder else source
        if name in metadata.get(folder, {}):
            return metadata[folder][name]
    return None


def _metadata_line(line: str, where: str) -> tuple[str, str, set[str]]:
    """Return file name, caption, and the names of all other fields."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"not JSON: {error}", where=where) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise CorruptError("names no file", expected='an object with "file_name": "…"', where=where)
    caption = next((fields[key] for key in CAPTION_FIELDS if fields.get(key) is not None), "")
    if not isinstance(caption, str) or not _is_unicode(caption):
        raise CorruptError("the caption is not text", expected="a Unicode string", where=where)
    caption = caption.strip()
    if len(caption.encode()) > MAX_CAPTION_BYTES:
        raise CorruptError(
            f"a caption of {len(caption.encode())} bytes",
            expected=f"at most {MAX_CAPTION_BYTES}",
            where=where,
            action="shorten it: text encoders see its first 77 tokens",
        )
    names = {name for name in fields if name != "file_name"}
    return posixpath.normpath(fields["file_name"]), caption, names


def _read_utf8(path: Path, max_bytes: int) -> str:
    try:
        return regular_file.read_bytes(path, max_bytes).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise CorruptError("is gone, or a link that leads nowhere", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise CorruptError(
            f"byte {error.start} is not UTF-8",
            expected="text in UTF-8",
            where=str(path),
            action="save the file as UTF-8",
        ) from error


def _is_unicode(text: str) -> bool:
    """Whether a string from JSON has no half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
