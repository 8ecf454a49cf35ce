"""CLIP's tokenizers: loaded by explicit class from local files, identified by what they do.

Versions of transformers write different files and read different ones: `copy_tokenizer` leaves
those that all of them read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final, cast

# One class in transformers 5; in 4 the only one with the Rust tokenizer inside.
from transformers import (
    CLIPTokenizer,
    CLIPTokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
)

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.models.json_files import read_json
from sdxl_distill.storage.regular_file import storage_errors

_MAX_TOKENS = 4096
"""Longer means unlimited: a tokenizer whose files name no limit reports 10³⁰."""
_VOCABULARY: Final = "vocab.json"
_MERGES: Final = "merges.txt"
_MERGED: Final = "tokenizer.json"
_SPECIAL_TOKENS: Final = "special_tokens_map.json"
_SETTINGS: Final = "tokenizer_config.json"
_ADDED_TOKENS: Final = "added_tokens.json"


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load one tokenizer.

    Raises:
        ConfigError: when its files are missing: the library would build an empty one.
        CorruptError: when they cannot be read.
        IncompatibleError: when they name no token limit.
    """
    names = _file_names(folder)
    if _MERGED not in names and not {_VOCABULARY, _MERGES} <= names:
        raise ConfigError(
            "no tokenizer files",
            expected="vocab.json and merges.txt, or tokenizer.json",
            where=str(folder),
            action="copy the tokenizer's folder again",
        )
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises nothing more specific
        raise CorruptError(
            f"tokenizer files that cannot be read ({error})",
            where=str(folder),
            action="copy the tokenizer's folder again",
        ) from error
    if tokenizer.model_max_length > _MAX_TOKENS:
        raise IncompatibleError(
            "tokenizer_config.json names no model_max_length", expected="77", where=str(folder)
        )
    return cast("CLIPTokenizer", tokenizer)


def tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> str:
    """Return the SHA-256 of vocabulary, merges, special tokens and token limit, in hex.

    Equal for the same tokenizer saved as vocab.json with merges.txt or as tokenizer.json.
    """
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    return fingerprint(
        {
            "vocabulary": tokenizer.get_vocab(),
            "merges": _merges(_model(tokenizer)),
            "special": special,
            "num_tokens": tokenizer.model_max_length,
        }
    )


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy a tokenizer's folder as files that transformers 4 and 5 both read.

    Existing files are copied as they are. If there is only the `tokenizer.json` that transformers 5
    saves, from which version 4 makes no `CLIPTokenizer`, the others are written from it.

    Args:
        source: the tokenizer's folder.
        destination: the folder to write; it must not exist, but its parent must.

    Raises:
        ConfigError, CorruptError: as `load_tokenizer`.
        IncompatibleError: as that, and when vocabulary and merges cannot express what it does.
    """
    tokenizer = load_tokenizer(source)
    wanted = tokenizer_fingerprint(tokenizer)
    destination.mkdir()
    names = _file_names(source)
    is_copied = {_VOCABULARY, _MERGES, _SETTINGS} <= names and _is_of_every_version(source)
    # The source's own files, if every version reads them.
    if is_copied:
        for name in names & {_VOCABULARY, _MERGES, _SETTINGS, _SPECIAL_TOKENS, _ADDED_TOKENS}:
            shutil.copyfile(source / name, destination / name)
    # Else files of ours, which must give the same tokenizer.
    if not is_copied or tokenizer_fingerprint(load_tokenizer(destination)) != wanted:
        _write_files(tokenizer, destination)
    if tokenizer_fingerprint(load_tokenizer(destination)) != wanted:
        raise IncompatibleError(
            "vocab.json and merges.txt cannot express what the tokenizer does",
            expected="a byte-level CLIP tokenizer",
            where=str(source),
            action="use the tokenizer files of the checkpoint that it was fine-tuned from",
        )
    if _MERGED in names:
        shutil.copyfile(source / _MERGED, destination / _MERGED)


def _is_of_every_version(folder: Path) -> bool:
    """Whether version 4 reads the settings: version 5 lists tokens where 4 wants them by name."""
    return not isinstance(read_json(folder / _SETTINGS).get("extra_special_tokens"), list)


def _write_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the four files that SDXL's own tokenizer folders hold."""
    for path in folder.iterdir():
        path.unlink()
    # The settings, with every added token spelled out.
    model = _model(tokenizer)
    special = dict(tokenizer.special_tokens_map)
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    settings = {
        **special,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "do_lower_case": True,
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    # Merges as lines of text, everything else as JSON.
    lines = ["#version: 0.2", *(" ".join(merge) for merge in _merges(model))]
    (folder / _MERGES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (
        (_VOCABULARY, model["vocab"]),
        (_SPECIAL_TOKENS, special),
        (_SETTINGS, settings),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _model(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The Rust tokenizer's byte-pair model: vocabulary and merges."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def _merges(model: dict[str, Any]) -> list[list[str]]:
    """The merges in their order; older libraries write each as one string."""
    return [
        merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]
    ]


def _file_names(folder: Path) -> set[str]:
    with storage_errors(folder):
        return {path.name for path in folder.iterdir()}
