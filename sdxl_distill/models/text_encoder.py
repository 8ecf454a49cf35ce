"""SDXL's two text encoders with their tokenizers: captions to the embeddings of records.

Equal to `StableDiffusionXLPipeline.encode_prompt` of each caption alone. Captions are encoded
one at a time: on CPUs the last bits of a float32 matrix product depend on the size of the batch
(up to 32 of a batch's float16 values differ), and a caption's embeddings must not depend on
which other captions a process happens to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from sdxl_distill.errors import IncompatibleError, NumericalError
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.tokenizer import load_tokenizer
from sdxl_distill.models.unet import UnetGeometry

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class TextGeometry(NamedTuple):
    """The sizes of what the text encoders return.

    Attributes:
        num_tokens: tokens of every caption after padding: 77.
        hidden_size: width of a token: both encoders' widths together, 2048 in SDXL.
        pooled_size: width of the pooled embedding, 1280 in SDXL.
    """

    num_tokens: int
    hidden_size: int
    pooled_size: int


class TextEmbeddings(NamedTuple):
    """The embeddings of B captions, float16 on the CPU, as records hold them.

    Attributes:
        hidden: penultimate hidden states of both encoders side by side [B, tokens, hidden_size].
        pooled: projected end-of-text state of the second encoder [B, pooled_size].
    """

    hidden: torch.Tensor
    pooled: torch.Tensor


def text_geometry(checkpoint: ModelFolder) -> TextGeometry:
    """Read the sizes of text embeddings from the configurations, without any weights.

    Raises:
        ConfigError, CorruptError: when a configuration or a tokenizer is missing or unreadable.
        IncompatibleError: when tokenizers and encoders do not fit each other.
    """
    encoders = checkpoint.text_encoders
    tokenizers = [load_tokenizer(folder) for folder in checkpoint.tokenizer_folders]
    num_tokens = tokenizers[0].model_max_length
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        limit, num_ids = encoder.size("max_position_embeddings"), encoder.size("vocab_size")
        largest = max(tokenizer.get_vocab().values())
        if tokenizer.model_max_length != num_tokens or limit < num_tokens or num_ids <= largest:
            raise IncompatibleError(
                f"a tokenizer of {tokenizer.model_max_length} tokens and ids up to {largest} "
                f"next to an encoder of {limit} tokens and {num_ids} ids",
                expected="one token limit for both tokenizers, within the encoders' sizes",
                where=str(checkpoint.folder),
                action="copy tokenizers and text encoders from one checkpoint",
            )
    hidden_size = sum(encoder.size("hidden_size") for encoder in encoders)
    return TextGeometry(num_tokens, hidden_size, encoders[1].size("projection_dim"))


def require_fit(text: TextGeometry, unet: UnetGeometry, where: str) -> None:
    """Check that a UNet takes the embeddings of these text encoders.

    Raises:
        IncompatibleError: with both sizes; `where` says which checkpoints they belong to.
    """
    if (text.hidden_size, text.pooled_size) != (unet.hidden_size, unet.pooled_size):
        raise IncompatibleError(
            f"text embeddings of size {text.hidden_size}, pooled {text.pooled_size}",
            expected=f"{unet.hidden_size}, pooled {unet.pooled_size}, as the UNet takes them",
            where=where,
            action="name a text source of the same family as the UNet",
        )


class TextEncoders:
    """Both text encoders and tokenizers, loaded.

    Args:
        tokenizers: the first and the second.
        encoders: the first and the second.
    """

    def __init__(
        self,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    ) -> None:
        self.tokenizers = tokenizers
        self.encoders = encoders

    @classmethod
    def load(
        cls,
        checkpoint: ModelFolder,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoders:
        """Load both encoders, frozen and in evaluation mode.

        Args:
            checkpoint: the folder that holds them.
            device: the device that they run on.
            dtype: the dtype of weights and computation. float32 costs little, since a caption is
                encoded once, and records then hold the exact embeddings rounded to float16.

        Raises:
            ConfigError, CorruptError, IncompatibleError: as `text_geometry`, `Component.load`.
        """
        text_geometry(checkpoint)
        first, second = (load_tokenizer(folder) for folder in checkpoint.tokenizer_folders)
        encoders = [encoder.load(dtype, device) for encoder in checkpoint.text_encoders]
        return cls(
            (first, second),
            (
                cast("CLIPTextModel", encoders[0]),
                cast("CLIPTextModelWithProjection", encoders[1]),
            ),
        )

    @property
    def token_limit(self) -> int:
        """Tokens of a caption that are seen, start and end of text included: 77."""
        return self.tokenizers[0].model_max_length

    def num_tokens(self, caption: str) -> int:
        """Return how many tokens a caption has before any cut, start and end included."""
        return max(
            len(tokenizer(caption, truncation=False, verbose=False)["input_ids"])
            for tokenizer in self.tokenizers
        )

    def is_truncated(self, caption: str) -> bool:
        """Whether the end of a caption is not seen because it is beyond the token limit."""
        return self.num_tokens(caption) > self.token_limit

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Encode captions, each as if it were the only one; the empty caption is `""`.

        Returns:
            float16 embeddings on the CPU.

        Raises:
            NumericalError: when a value is NaN, infinite or beyond float16.
        """
        embeddings = [self._encode_one(caption) for caption in captions]
        return TextEmbeddings(
            torch.cat([embedding.hidden for embedding in embeddings]),
            torch.cat([embedding.pooled for embedding in embeddings]),
        )

    @torch.no_grad()
    def _encode_one(self, caption: str) -> TextEmbeddings:
        first, second = (
            encoder(
                self._input_ids(caption, tokenizer).to(encoder.device), output_hidden_states=True
            )
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)
        )
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        embeddings = TextEmbeddings(
            hidden.to("cpu", torch.float16), second.text_embeds.to("cpu", torch.float16)
        )
        if not all(torch.isfinite(embedding).all() for embedding in embeddings):
            raise NumericalError(
                f"the embeddings of {caption!r} are NaN, infinite or beyond float16",
                expected="finite embeddings",
                where=f"text encoders in {self.encoders[0].dtype}",
                action="encode in float32; if that does not help, the encoders' weights are broken",
            )
        return embeddings

    def _input_ids(self, caption: str, tokenizer: CLIPTokenizer) -> torch.Tensor:
        """The caption's token ids, cut and padded with the tokenizer's own pad token."""
        inputs = tokenizer(
            caption,
            padding="max_length",
            max_length=self.token_limit,
            truncation=True,
            return_tensors="pt",
        )
        return inputs["input_ids"]
