from __future__ import annotations

import json

import pytest

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.models.tokenizer import load_tokenizer


def test_a_folder_without_vocabulary_is_refused_and_not_replaced_by_an_empty_one(folder):
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer files"):
        load_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", '["a"]'),
        ("merges.txt", "#version: 0.2\nno such\n"),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{}"),
    ],
)
def test_files_that_make_no_tokenizer_are_corrupt(folder, name, content):
    (folder / "tokenizer" / name).write_text(content)
    with pytest.raises(CorruptError, match="cannot be read"):
        load_tokenizer(folder / "tokenizer")


def test_a_tokenizer_without_a_token_limit_is_incompatible(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match="model_max_length"):
        load_tokenizer(folder / "tokenizer")
