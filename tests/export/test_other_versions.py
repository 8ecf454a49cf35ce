"""A default export means the same to the oldest libraries that are allowed as to today's.

Those lie in `.venv-lowest`, which `make test` makes of constraints-lowest.txt.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from packaging.requirements import Requirement
from safetensors.torch import load_file
from support.distill_cache import DistillCache
from support.oracles import loaded_export

from sdxl_distill.demo.family import Family
from sdxl_distill.export.diffusers_folder import use_of
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.tensor_files import read_tensors
from sdxl_distill.train.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lowest/bin/python"
PINS = ROOT / "constraints-lowest.txt"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def seen(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the other environment wrote what it loaded, and its picture."""
    assert PYTHON.exists(), "there is no .venv-lowest: make it with `make .venv-lowest`"
    folder = tmp_path_factory.mktemp("seen")
    command = [PYTHON, loaded_export.__file__, export, folder, use_of(export)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder


def test_the_other_environment_has_the_lowest_versions(seen: Path) -> None:
    pinned = [Requirement(line) for line in PINS.read_text("utf-8").splitlines() if "==" in line]
    numbers = {
        each.name: str(each.specifier).removeprefix("==")
        for each in pinned
        if each.marker is None or each.marker.evaluate()
    }
    versions = json.loads((seen / "versions.json").read_text())
    found = {name: number.partition("+")[0] for name, number in versions.items()}
    assert found == {name: numbers[name] for name in loaded_export.PACKAGES}, "make .venv-lowest"
    assert found["diffusers"].startswith("0.35.") and found["transformers"].startswith("4.57.")


def test_identities_are_the_same_there(export: Path) -> None:
    code = (
        "import sys; from sdxl_distill.models.model_folder import ModelFolder\n"
        "checkpoint = ModelFolder.resolve(sys.argv[1])\n"
        "print(checkpoint.text_fingerprint(), checkpoint.unet_fingerprint())"
    )
    command = [PYTHON, "-c", code, export]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    ours = ModelFolder.resolve(str(export))
    assert ended.stdout.split() == [ours.text_fingerprint(), ours.unet_fingerprint()]


def test_it_loads_the_student_tensor_by_tensor(
    seen: Path, distill_cache: DistillCache, trained_run: Path, tiny_family: Family
) -> None:
    _, saved = RunFolder.of(distill_cache.config(trained_run)).checkpoints().load_latest()
    base = ModelFolder.resolve(str(tiny_family.base))
    expected = {
        f"unet/{name}": tensor.half().float() for name, tensor in saved.tensors["ema"].items()
    }
    for component in (base.vae, *base.text_encoders):
        for name, tensor in read_tensors(component.tensors):
            expected[f"{component.kind.name}/{name}"] = tensor.float()
    found = load_file(seen / "float32.safetensors")
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def test_it_gives_the_same_tokens_embeddings_and_latents(seen: Path, export: Path) -> None:
    expected = loaded_export.answers(StableDiffusionXLPipeline.from_pretrained(export))
    found = load_file(seen / "answers.safetensors")
    assert found.keys() == expected.keys()
    for name in loaded_export.TOKENIZERS:
        assert torch.equal(found[name], expected[name])
    for name in ("hidden", "pooled", "latents"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_it_samples_in_half_precision_too_and_runs_the_printed_lines(seen: Path) -> None:
    latents = load_file(seen / "half.safetensors")["latents"]
    assert latents.dtype == torch.float16 and latents.isfinite().all() and latents.std() > 0
    assert (seen / "cat.png").stat().st_size > 0
