"""What an exported folder is to the libraries that run this file: tensors, tokens, a picture.

Run by the Python of another environment, which need not have this project:
`python loaded_export.py EXPORT OUTPUT_FOLDER CODE`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
PROMPT = "a red flower in the garden, isn't it? ÄÖ 42"
PACKAGES = ("diffusers", "transformers", "safetensors", "torch", "numpy")


def loaded_tensors(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """Return every weight as it was loaded, by component and name without `text_model.`."""
    return {
        f"{component}/{name.removeprefix('text_model.')}": tensor.contiguous()
        for component in COMPONENTS
        for name, tensor in getattr(pipeline, component).state_dict().items()
    }


def answers(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """Return token ids and embeddings of a prompt, and the latents of two steps."""
    ids = {name: torch.tensor(getattr(pipeline, name)(PROMPT)["input_ids"]) for name in TOKENIZERS}
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    latents = sampled_latents(pipeline)
    return {**ids, "hidden": hidden, "pooled": pooled, "latents": latents}


def sampled_latents(pipeline: StableDiffusionXLPipeline) -> torch.Tensor:
    """Return the latents of two steps from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    latents: Any = pipeline(PROMPT, generator=generator, **options).images
    return latents


def main() -> None:
    """Write `float32.safetensors`, `answers.safetensors`, `half.safetensors`, `versions.json`."""
    export, output, code = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(export)
    save_file(loaded_tensors(pipeline), output / "float32.safetensors")
    save_file(answers(pipeline), output / "answers.safetensors")
    half = StableDiffusionXLPipeline.from_pretrained(export, torch_dtype=torch.float16)
    save_file({"latents": sampled_latents(half)}, output / "half.safetensors")
    exec(code, {})
    versions = {name: version(name) for name in PACKAGES}
    (output / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
