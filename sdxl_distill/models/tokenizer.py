"""CLIP's tokenizers: loaded by explicit class from local files, identified by what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.fingerprint import fingerprint
from sdxl_distill.fsio import storage_errors

_MAX_TOKENS = 4096
"""A tokenizer whose files name no limit says 10³⁰."""


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load one tokenizer.

    Raises:
        ConfigError: when its files are missing: the library would build an empty one.
        CorruptError: when they cannot be read.
        IncompatibleError: when they name no token limit.
    """
    with storage_errors(folder):
        names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise ConfigError(
            "no tokenizer files",
            expected="vocab.json and merges.txt, or tokenizer.json",
            where=str(folder),
            action="copy the tokenizer's folder again",
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
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
    return tokenizer


def tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> str:
    """Return the SHA-256 of vocabulary, merges, special tokens and token limit, in hex.

    Equal for the same tokenizer saved as vocab.json with merges.txt or as tokenizer.json.
    """
    model: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [
        merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]
    ]
    special = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    return fingerprint(
        {
            "vocabulary": tokenizer.get_vocab(),
            "merges": merges,
            "special": special,
            "num_tokens": tokenizer.model_max_length,
        }
    )
