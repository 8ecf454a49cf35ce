from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_distill.demo.family import Recipe, build_family, build_untrained_family
from sdxl_distill.models.model_folder import ModelFolder

SHORT = Recipe(vae_steps=2, base_steps=4, teacher_steps={"sepia": 2, "night": 3, "vivid": 2})


def _content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _sample(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        # diffusers' scheduler converts tensors in a way that numpy 2 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        (image,) = pipeline(
            "a photo of a cat",
            width=96,
            height=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        ).images
    return image


@pytest.fixture(scope="module")
def few_photos(photo_folders, tmp_path_factory):
    """Two crops per bucket are enough where only files and steps count."""
    folder = tmp_path_factory.mktemp("few_photos")
    for path in photo_folders.held_out.iterdir():
        if path.name.startswith(("chelsea", "china")):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def short_family(few_photos, tmp_path_factory):
    return build_family(tmp_path_factory.mktemp("trained"), few_photos, SHORT)


def test_diffusers_samples_from_every_untrained_folder(tiny_family):
    for folder in (tiny_family.base, *tiny_family.teachers):
        assert _sample(folder).size == (96, 64)


def test_diffusers_samples_from_every_trained_folder(short_family):
    for folder in (short_family.base, *short_family.teachers):
        assert _sample(folder).size == (96, 64)


def test_an_untrained_family_is_a_function_of_its_seed(tiny_family, tmp_path):
    root = tiny_family.base.parent
    assert _content(build_untrained_family(tmp_path / "again").base.parent) == _content(root)
    other = build_untrained_family(tmp_path / "other", seed=1)
    assert (
        ModelFolder.resolve(str(other.base)).unet_fingerprint()
        != ModelFolder.resolve(str(tiny_family.base)).unet_fingerprint()
    )


def test_a_trained_family_is_a_function_of_photos_recipe_and_seed(
    few_photos, short_family, tmp_path
):
    again = build_family(tmp_path, few_photos, SHORT)
    assert _content(again.base.parent) == _content(short_family.base.parent)


@pytest.mark.parametrize("name", ["tiny_family", "short_family"])
def test_teachers_differ_from_the_base_in_their_unet_alone(name, request):
    family = request.getfixturevalue(name)
    base = _content(family.base)
    for teacher in family.teachers:
        content = _content(teacher)
        assert content.keys() == base.keys()
        differing = {path for path in base if base[path] != content[path]}
        assert differing == {"unet/diffusion_pytorch_model.safetensors"}


def test_training_reports_every_step_of_the_base_and_the_end_of_every_teacher(few_photos, tmp_path):
    seen = []
    build_family(
        tmp_path,
        few_photos,
        SHORT,
        progress=lambda name, step, num_steps, _loss: seen.append((name, step, num_steps)),
    )
    assert seen[:6] == [("VAE", 1, 2), ("VAE", 2, 2), *(("base", step, 4) for step in (1, 2, 3, 4))]
    assert sorted(seen[6:]) == [("night", 3, 3), ("sepia", 2, 2), ("vivid", 2, 2)]


def test_an_untrained_family_may_predict_something_else_than_noise(tmp_path):
    family = build_untrained_family(tmp_path, prediction_type="v_prediction", num_teachers=1)
    for folder in (family.base, *family.teachers):
        schedule = ModelFolder.resolve(str(folder)).noise_schedule()
        assert schedule.prediction_type == "v_prediction"
