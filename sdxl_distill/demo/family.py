"""The demo's checkpoints: one base SDXL folder and the teachers fine-tuned from it.

Every folder is complete: `StableDiffusionXLPipeline.from_pretrained` loads and samples from it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import EulerDiscreteScheduler, __version__ as diffusers_version

from sdxl_distill.demo.tiny_text import write_text_components
from sdxl_distill.demo.tiny_unet import new_unet
from sdxl_distill.demo.tiny_vae import new_vae
from sdxl_distill.demo.weights import draw_weights, perturb_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import UNet2DConditionModel

UNTRAINED_CAPTIONS = (
    "a photo of a cat in the grass",
    "a photo of a cup of coffee",
    "a red flower in the garden, a photo",
    "the roof of a temple in china",
)
"""What the untrained family's tokenizers are trained on."""


@dataclass(frozen=True)
class Family:
    """Folders of one SDXL family.

    Attributes:
        base: complete diffusers folder of the model that the student starts from.
        teachers: the same with another UNet each; the folder's name is the teacher's id.
    """

    base: Path
    teachers: tuple[Path, ...]


def build_untrained_family(
    directory: str | Path,
    seed: int = 0,
    *,
    num_teachers: int = 3,
    prediction_type: str = "epsilon",
    block_widths: Sequence[int] = (16, 32, 32),
) -> Family:
    """Write a family of random weights in about a second: same files and shapes, no training.

    Args:
        directory: receives `base` and `teacher_a`, `teacher_b`, …; must not hold them yet.
        seed: decides every weight.
        num_teachers: perturbed copies of the base UNet.
        prediction_type: what the schedulers say: epsilon, v_prediction or sample.
        block_widths: channels of the UNet's three resolutions, multiples of 8.

    Returns:
        The folders.
    """
    directory = Path(directory)
    generator = torch.Generator().manual_seed(seed)
    base = directory / "base"
    write_text_components(base, UNTRAINED_CAPTIONS, generator)
    vae = new_vae()
    draw_weights(vae, generator)
    vae.save_pretrained(base / "vae")
    unet = new_unet(block_widths)
    draw_weights(unet, generator)
    unet.save_pretrained(base / "unet")
    write_scheduler_and_index(base, prediction_type)

    teachers = []
    for letter in "abcdefgh"[:num_teachers]:
        teacher = new_unet(block_widths)
        teacher.load_state_dict(unet.state_dict())
        perturb_weights(teacher, relative_std=0.2, generator=generator)
        teachers.append(directory / f"teacher_{letter}")
        write_teacher(teachers[-1], base, teacher)
    return Family(base, tuple(teachers))


def write_teacher(directory: Path, base: Path, unet: UNet2DConditionModel) -> None:
    """Write a complete folder: the base's files with another UNet.

    Files are copied, not linked: whoever edits a teacher's config must not edit the base's.
    """
    shutil.copytree(base, directory, ignore=shutil.ignore_patterns("unet"))
    unet.save_pretrained(directory / "unet")


def write_scheduler_and_index(directory: Path, prediction_type: str = "epsilon") -> None:
    """Write SDXL's scheduler configuration and, last of all files, `model_index.json`."""
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    ).save_pretrained(directory / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers_version,
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
