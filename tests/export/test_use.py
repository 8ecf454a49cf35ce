"""A default export is used as its printed lines say, and is its sources' but for the UNet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from support.distill_cache import DistillCache
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_distill.demo.family import Family
from sdxl_distill.demo.weights import draw_weights
from sdxl_distill.errors import IncompatibleError
from sdxl_distill.export.diffusers_folder import export_diffusers_folder, use_of
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.tensor_files import read_header
from sdxl_distill.train.session import train_student

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
TOKENIZERS = ("tokenizer", "tokenizer_2")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Newer diffusers ask for `dtype`, which older ones do not know.
    pytest.mark.filterwarnings("ignore:.*(torch_dtype|upcast_vae)` is deprecated:FutureWarning"),
]


@pytest.fixture
def half_base(tiny_family: Family, tmp_path: Path) -> Path:
    """A base as many on the hub are: everything stored in half precision, configurations say so."""
    folder = shutil.copytree(tiny_family.base, tmp_path / "half")
    for path in folder.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    for name in ENCODERS:
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        del config["dtype"]
        path.write_text(json.dumps({**config, "torch_dtype": "float16"}))
    return folder


@pytest.fixture(scope="module")
def export_with_attention(tiny_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose VAE has SDXL's attention, which diffusers looks for when it casts it."""
    folder = tmp_path_factory.mktemp("attention")
    base = shutil.copytree(tiny_family.base, folder / "base")
    config = json.loads((base / "vae" / "config.json").read_text())
    vae = AutoencoderKL.from_config({**config, "mid_block_add_attention": True})
    draw_weights(vae, torch.Generator().manual_seed(0))
    vae.save_pretrained(base / "vae")
    return export_of(base, folder / "export")


def export_of(base: Path, destination: Path, text: Path | None = None) -> Path:
    """Export a base as if it had been trained for no step."""
    checkpoint = ModelFolder.resolve(str(base))
    weights = checkpoint.unet.load(torch.float32, "cpu").state_dict()
    source = ModelFolder.resolve(str(text or base))
    export_diffusers_folder(destination, checkpoint, source, checkpoint, weights, torch.float16)
    return destination


def sample(folder: Path, **options: object) -> torch.Tensor:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, **options)
    dtypes = {each.dtype for each in pipeline.components.values() if hasattr(each, "dtype")}
    assert dtypes == {options.get("torch_dtype", torch.float32)}
    images = pipeline("a photo of a cat", num_inference_steps=2, output_type="np").images
    return torch.from_numpy(images)


def test_the_printed_lines_make_a_picture(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(use_of(export), {})
    assert (tmp_path / "cat.png").stat().st_size > 0


@pytest.mark.parametrize(
    "options", [{}, {"torch_dtype": torch.float16}, {"torch_dtype": torch.bfloat16}], ids=str
)
def test_a_default_export_is_called_in_any_dtype(
    export_with_attention: Path, options: dict[str, torch.dtype]
) -> None:
    image = sample(export_with_attention, **options)
    assert image.isfinite().all() and image.std() > 0


def test_sources_in_half_precision_are_called_as_float32(half_base: Path, tmp_path: Path) -> None:
    assert sample(export_of(half_base, tmp_path / "export")).isfinite().all()


@pytest.mark.parametrize("is_half", [False, True])
def test_text_encoders_and_vae_are_their_sources_bit_for_bit(
    is_half: bool, tiny_family: Family, half_base: Path, tmp_path: Path
) -> None:
    base = half_base if is_half else tiny_family.base
    ours = ModelFolder.resolve(str(export_of(base, tmp_path / "export")))
    theirs = ModelFolder.resolve(str(base))
    assert ours.text_fingerprint() == theirs.text_fingerprint()
    assert ours.vae_fingerprint() == theirs.vae_fingerprint()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_names_of_the_hub_s_files(export: Path, name: str) -> None:
    found = read_header(export / name / "model.safetensors").keys()
    projection = {"text_projection.weight"} if name == "text_encoder_2" else set()
    assert projection <= found
    assert all(tensor.startswith("text_model.") for tensor in found - projection)


def test_files_with_and_without_the_prefix_are_the_same_text_source(
    tiny_family: Family, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_family.base, tmp_path / "bare")
    prefixed = shutil.copytree(tiny_family.base, tmp_path / "prefixed")
    for folder, prefix in ((bare, ""), (prefixed, "text_model.")):
        path = folder / "text_encoder" / "model.safetensors"
        plain = {name.removeprefix("text_model."): each for name, each in load_file(path).items()}
        save_file({prefix + name: tensor for name, tensor in plain.items()}, path)
    assert (
        len({ModelFolder.resolve(str(each)).text_fingerprint() for each in (bare, prefixed)}) == 1
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_files_are_the_source_s(export: Path, tiny_family: Family, name: str) -> None:
    found, expected = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for folder in (export, tiny_family.base)
    )
    assert found == expected


def test_the_index_names_what_is_written_and_nothing_else(
    tiny_family: Family, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_family.base, tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    index["force_zeros_for_empty_prompt"] = False
    for name in ("scheduler", "tokenizer", "unet"):  # the folders alone are enough for us
        del index[name]
    (base / "model_index.json").write_text(json.dumps(index))
    export = export_of(base, tmp_path / "export")
    assert sample(export).isfinite().all()
    written = json.loads((export / "model_index.json").read_text())
    assert {name for name, entry in written.items() if isinstance(entry, list) and entry[0]} == {
        path.name for path in export.iterdir() if path.is_dir()
    }
    assert written["force_zeros_for_empty_prompt"] is False


def test_one_s_own_default_export_is_trained_further_without_another_text_set(
    distill_cache: DistillCache, export: Path, tmp_path: Path
) -> None:
    config = distill_cache.config(
        tmp_path, f"student.checkpoint_path={export}", "training.num_steps=1"
    )
    assert train_student(config).global_step == 1


def test_rounded_encoders_are_refused_with_the_cheap_remedy_first(
    distill_cache: DistillCache, half_base: Path, tmp_path: Path
) -> None:
    config = distill_cache.config(tmp_path, f"student.checkpoint_path={half_base}")
    with pytest.raises(IncompatibleError, match=r"set student\.text_encoder_id .* only to .*build"):
        train_student(config)
    mended = f"student.text_encoder_id={distill_cache.family.base}"
    config = distill_cache.config(
        tmp_path, f"student.checkpoint_path={half_base}", mended, "training.num_steps=1"
    )
    assert train_student(config).global_step == 1
