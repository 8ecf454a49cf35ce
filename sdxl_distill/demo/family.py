"""The demo's checkpoints: one base SDXL folder and the teachers fine-tuned from it.

Every folder is complete: `StableDiffusionXLPipeline.from_pretrained` loads and samples from it.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import EulerDiscreteScheduler, __version__ as diffusers_version

from sdxl_distill.demo.encoded_photos import Photos, encode_photos, read_photos
from sdxl_distill.demo.looks import LOOKS
from sdxl_distill.demo.tiny_text import write_text_components
from sdxl_distill.demo.tiny_unet import new_unet
from sdxl_distill.demo.tiny_vae import draw_pyramid, new_vae
from sdxl_distill.demo.training import train_unet, train_vae
from sdxl_distill.demo.weights import draw_weights, perturb_weights
from sdxl_distill.models.component_kind import PIPELINE_PARTS
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.text_encoder import TextEncoders
from sdxl_distill.models.unet import load_unet
from sdxl_distill.models.vae import load_vae
from sdxl_distill.runtime.cores import available_cores
from sdxl_distill.storage.file_mode import follow_umask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffusers import UNet2DConditionModel

    Progress = Callable[[str, int, int, float], None]
    """Gets the name of the network, step (from 1), number of steps and loss."""

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


@dataclass(frozen=True)
class Recipe:
    """How long and how hard the family is trained.

    Attributes:
        vae_steps: steps of 8 patches of 64 × 64 pixels.
        vae_lr: peak learning rate.
        base_steps: steps of 16 photos.
        base_lr: peak learning rate.
        teacher_steps: steps of 16 photos, by teacher id; night is furthest from the photos.
        teacher_lr: peak learning rate.
    """

    vae_steps: int = 140
    vae_lr: float = 2e-3
    base_steps: int = 350
    base_lr: float = 2e-3
    teacher_steps: dict[str, int] = field(
        default_factory=lambda: {"sepia": 100, "night": 140, "vivid": 100}
    )
    teacher_lr: float = 1e-3


def build_family(
    directory: str | Path,
    photos: str | Path,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Family:
    """Train a base on photos, and from it one teacher per look.

    Every network is trained by one thread, since the last bits depend on their number; the
    teachers are trained side by side, one process each. So the family is the same on all
    machines with one kind of processor and one set of library versions.

    Args:
        directory: the folder for `base`, `sepia`, `night` and `vivid`; must not hold them yet.
        photos: an image folder as `write_photos` writes it.
        recipe: steps and learning rates; the default takes about two minutes on two cores.
        seed: the seed of every weight.
        progress: a function that gets the name of the network, step, number of steps and loss:
            the base's after each step, a teacher's when it is done.

    Returns:
        The folders.
    """
    directory, recipe = Path(directory), recipe or Recipe()
    base = directory / "base"
    with one_thread():
        train_base(base, read_photos(Path(photos)), recipe, seed, progress)
    teachers = tuple(directory / teacher_id for teacher_id in LOOKS)
    # Spawned, because a fork of a process whose threads have computed may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(available_cores(), mp_context=context) as pool:
        trainings = {
            pool.submit(train_teacher, teacher, base, Path(photos), recipe, seed + number): teacher
            for number, teacher in enumerate(teachers, start=1)
        }
        for training in as_completed(trainings):
            name = trainings[training].name
            num_steps = recipe.teacher_steps[name]
            progress(name, num_steps, num_steps, training.result())
    return Family(base, teachers)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread within the block."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def train_base(
    directory: Path,
    photos: Sequence[Photos],
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> None:
    """Train VAE and UNet from scratch and write the base's folder; arguments as `build_family`."""
    generator = torch.Generator().manual_seed(seed)
    captions = [caption for each in photos for caption in each.captions]
    write_text_components(directory, captions, generator)
    write_scheduler_and_index(directory)

    vae = new_vae()
    draw_pyramid(vae, generator)
    report = _reporter(progress, "VAE", recipe.vae_steps)
    train_vae(vae, photos, recipe.vae_steps, recipe.vae_lr, generator, report)
    vae.save_pretrained(directory / "vae")

    unet = new_unet()
    draw_weights(unet, generator)
    report = _reporter(progress, "base", recipe.base_steps)
    _train_on(unet, directory, photos, recipe.base_steps, recipe.base_lr, generator, report)
    unet.save_pretrained(directory / "unet")
    follow_umask(directory)


def train_teacher(directory: Path, base: Path, photos: Path, recipe: Recipe, seed: int) -> float:
    """Fine-tune the base towards the look of the folder's name and return the last loss."""
    num_steps = recipe.teacher_steps[directory.name]
    generator = torch.Generator().manual_seed(seed)
    restyled = [each.restyled(LOOKS[directory.name]) for each in read_photos(photos)]
    # A new network, since a loaded one would write the base's path into its configuration.
    unet = new_unet()
    loaded = load_unet(ModelFolder.resolve(str(base)), torch.float32, "cpu")
    unet.load_state_dict(loaded.state_dict())
    losses: list[float] = []
    with one_thread():
        _train_on(
            unet, base, restyled, num_steps, recipe.teacher_lr, generator,
            lambda _step, loss: losses.append(loss),
        )  # fmt: skip
    write_teacher(directory, base, unet)
    return losses[-1]


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
        directory: the folder for `base`, `teacher_a`, `teacher_b`, …; must not hold them yet.
        seed: the seed of every weight.
        num_teachers: the number of perturbed copies of the base UNet.
        prediction_type: the type that the schedulers state: epsilon, v_prediction or sample.
        block_widths: channels of the UNet's three resolutions, multiples of 8.

    Returns:
        The folders.
    """
    # The base, every network drawn from one generator.
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
    follow_umask(base)

    # Teachers: the base with a disturbed UNet each.
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

    Files are copied, not linked, so that editing a teacher's config leaves the base's alone.
    """
    shutil.copytree(base, directory, ignore=shutil.ignore_patterns("unet"))
    unet.save_pretrained(directory / "unet")
    follow_umask(directory)


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
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        **PIPELINE_PARTS,
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _train_on(
    unet: UNet2DConditionModel,
    base: Path,
    photos: Sequence[Photos],
    num_steps: int,
    peak_lr: float,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> None:
    """Train a UNet on photos and their mirror images, encoded by the base's VAE and texts."""
    checkpoint = ModelFolder.resolve(str(base))
    vae = load_vae(checkpoint, torch.float32, "cpu")
    texts = TextEncoders.load(checkpoint, "cpu")
    both = [
        Photos(each.bucket, torch.cat([each.pixels, each.mirrored().pixels]), each.captions * 2)
        for each in photos
    ]
    encoded = [encode_photos(each, vae, texts) for each in both]
    train_unet(unet, encoded, checkpoint.noise_schedule(), num_steps, peak_lr, generator, on_step)


def _reporter(progress: Progress, name: str, num_steps: int) -> Callable[[int, float], None]:
    return lambda step, loss: progress(name, step, num_steps, loss)
