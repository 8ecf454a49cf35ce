from __future__ import annotations

import json

import pytest

from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.models.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_fingerprint


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


VERSION_4_FILES = {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}


def saved_by_version_5(source, destination, *more_tokens):
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(list(more_tokens))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{len(more_tokens)}>"]})
    tokenizer.save_pretrained(destination)
    for name in VERSION_4_FILES - {"tokenizer_config.json"}:
        (destination / name).unlink(missing_ok=True)
    assert "tokenizer.json" in {path.name for path in destination.iterdir()}
    return destination


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("more_tokens", [(), ("<cat-toy>", "<dog-toy>")])
def test_what_tokenizer_json_alone_says_is_written_for_version_4_too(
    folder, tmp_path, name, more_tokens
):
    source = saved_by_version_5(folder / name, tmp_path / "five", *more_tokens)
    copy_tokenizer(source, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        *VERSION_4_FILES,
        "tokenizer.json",
    }
    (tmp_path / "copy" / "tokenizer.json").unlink()
    found, expected = load_tokenizer(tmp_path / "copy"), load_tokenizer(source)
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(expected)
    caption = "a photo of a <cat-toy>, isn't it ÄÖ 東 <|endoftext|> 42!"
    assert found(caption)["input_ids"] == expected(caption)["input_ids"]


def test_merges_that_disagree_with_tokenizer_json_are_written_from_it(folder, tmp_path):
    source = folder / "tokenizer"
    load_tokenizer(source).save_pretrained(source)
    merges = (source / "merges.txt").read_text("utf-8").splitlines()
    (source / "merges.txt").write_text("\n".join(merges[:-3]) + "\n", "utf-8")
    copy_tokenizer(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "merges.txt").read_text("utf-8").splitlines() == merges


def test_a_copied_tokenizer_has_the_files_of_its_source(folder, tmp_path):
    copy_tokenizer(folder / "tokenizer", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == {
        path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()
    }
