from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from sdxl_distill.demo.tiny_text import train_vocabulary, write_text_components

CAPTIONS = ["a photo of a tabby cat", "a photo of a cup of coffee", "a tall photo of a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    write_text_components(directory, CAPTIONS, torch.Generator().manual_seed(0))
    return directory


@pytest.mark.parametrize(
    ("name", "others"),
    [("text_encoder", set()), ("text_encoder_2", {"text_projection.weight"})],
)
def test_encoders_have_the_names_of_the_hub_that_every_version_reads(folder, name, others):
    names = set(load_file(folder / name / "model.safetensors"))
    assert {each for each in names if not each.startswith("text_model.")} == others
    assert len(names) > 30


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("text", ["a photo of a cat", "zebra!? 42", "größer ☃"])
def test_any_text_survives_the_tokenizer(folder, name, text):
    tokenizer = CLIPTokenizer.from_pretrained(folder / name)
    _start, *ids, _end = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_frequent_words_are_one_token(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert len(tokenizer("photo of a cat")["input_ids"]) == 2 + 4


@pytest.mark.parametrize(
    ("name", "pad_token"), [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")]
)
def test_each_tokenizer_pads_with_its_own_token(folder, name, pad_token):
    tokenizer = CLIPTokenizer.from_pretrained(folder / name)
    ids = tokenizer("a cat", padding="max_length")["input_ids"]
    assert len(ids) == 77
    assert set(ids[4:]) == {tokenizer.convert_tokens_to_ids(pad_token)}


def test_special_tokens_come_last_as_in_clip():
    vocabulary, merges = train_vocabulary(CAPTIONS)
    assert vocabulary["!"] == 0
    assert len(vocabulary) == 512 + len(merges) + 2
    assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1


def test_vocabulary_is_a_function_of_the_captions():
    assert train_vocabulary(CAPTIONS) == train_vocabulary(CAPTIONS)


def test_vocabulary_is_the_same_in_every_process(photo_folders):
    """Hash maps of the trainer have another order in each process; ties must not follow it."""
    captions = [path.read_text() for path in sorted(photo_folders.train.rglob("*.txt"))]
    program = (
        "import sys, json; from sdxl_distill.demo.tiny_text import train_vocabulary;"
        "print(json.dumps(train_vocabulary(json.loads(sys.argv[1]))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, json.dumps(captions)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(4)
    }
    assert len(outputs) == 1
