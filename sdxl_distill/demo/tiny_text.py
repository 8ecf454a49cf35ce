"""Both text encoders and both tokenizers of a tiny SDXL: the real classes, 2 layers × 32 wide.

The encoders stay random: a random transformer already gives every caption its own embedding, and
the UNet learns to read it. The tokenizers are byte-level CLIP BPE, trained on the captions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_distill.demo.weights import draw_weights
from sdxl_distill.models.component_kind import TEXT_ENCODER, TEXT_ENCODER_2

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN_SIZE = 32
"""Width of each encoder; the UNet attends to both, concatenated: 64 channels."""

PROJECTION_SIZE = 32
"""Channels of the second encoder's pooled embedding."""

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
PAD_TOKENS = {"tokenizer": END, "tokenizer_2": "!"}
"""The pad token of each tokenizer, as in SDXL."""

_WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_text_components(
    directory: Path, captions: Sequence[str], generator: torch.Generator
) -> None:
    """Write `tokenizer`, `tokenizer_2`, `text_encoder` and `text_encoder_2` below `directory`."""
    vocabulary, merges = train_vocabulary(captions)
    for name, pad_token in PAD_TOKENS.items():
        _write_tokenizer(directory / name, vocabulary, merges, pad_token)
    config = _encoder_config(vocabulary)
    for kind, network in (
        (TEXT_ENCODER, CLIPTextModel),
        (TEXT_ENCODER_2, CLIPTextModelWithProjection),
    ):
        encoder = network(config)
        draw_weights(encoder, generator)
        encoder.save_pretrained(directory / kind.name)
        # transformers 5 saves them under names that version 4 does not know.
        weights = {
            kind.hub_name(kind.plain_name(name)): weight
            for name, weight in encoder.state_dict().items()
        }
        path = directory / kind.name / f"{kind.weights_stem}.safetensors"
        save_file(weights, path, metadata={"format": "pt"})


def train_vocabulary(
    captions: Sequence[str], num_merges: int = 256
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a byte-level BPE in the layout of CLIP's own vocabulary.

    Args:
        captions: text to learn the merges from; any other text still encodes, byte by byte.
        num_merges: upper bound of the merges; pairs that occur once are never merged.

    Returns:
        (vocabulary, merges): 256 bytes ("!" is 0), 256 bytes that end a word, one token per
        merge, start and end of text.
    """
    alphabet = _bytes_in_clip_order()
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=2 * len(alphabet) + num_merges,
        min_frequency=2,
        initial_alphabet=alphabet,
        # Equally frequent pairs are merged in the order of their numbers. Without these tokens,
        # letters that end a word would be numbered in the order of a hash map, which varies.
        special_tokens=[f"{letter}</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [(left, right) for left, right in learned][:num_merges]
    tokens = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        *(left + right for left, right in merges),
        START,
        END,
    ]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _bytes_in_clip_order() -> list[str]:
    """The 256 byte letters of GPT-2 and CLIP: printable ones as themselves, from "!" on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = len([byte for byte in range(256) if byte not in set(printable)])
    return [chr(code) for code in (*printable, *range(256, 256 + others))]


def _write_tokenizer(
    directory: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], pad_token: str
) -> None:
    """Write the four files that SDXL's own tokenizer folders hold."""
    directory.mkdir(parents=True)
    special = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": pad_token,
        "unk_token": END,
    }
    settings: dict[str, Any] = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(directory / "vocab.json", vocabulary)
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(directory / "tokenizer_config.json", settings)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _encoder_config(vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        projection_dim=PROJECTION_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
