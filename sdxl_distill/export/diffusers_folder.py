"""A complete diffusers folder: the trained UNet with the VAE, text encoders and scheduler it needs.

`StableDiffusionXLPipeline.from_pretrained` of every supported version loads it, in any dtype. All
but the UNet is copied from its source bit for bit, so that sets made with it still fit. It is
written under a temporary name and renamed, so that the folder is complete or not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.models.component import Component
from sdxl_distill.models.component_kind import PIPELINE_PARTS
from sdxl_distill.models.json_files import read_json
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.models.tokenizer import copy_tokenizer
from sdxl_distill.shards.safetensors_file import write_one_by_one
from sdxl_distill.shards.safetensors_layout import dtype_of
from sdxl_distill.storage.file_mode import follow_umask
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, new_token
from sdxl_distill.storage.regular_file import storage_errors

_USE: Final = """\
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained({folder})
# on a GPU: from_pretrained(…, torch_dtype=torch.float16).to("cuda")
pipeline("a photo of a cat").images[0].save("cat.png")"""


# transformers refuses files that do not say whose tensors they hold.
_METADATA: Final = {"format": "pt"}


def use_of(folder: str | Path) -> str:
    """Return lines of Python that sample from an exported folder, in every supported version."""
    return _USE.format(folder=json.dumps(str(folder), ensure_ascii=False))


def export_diffusers_folder(
    destination: Path,
    base: ModelFolder,
    text: ModelFolder,
    vae: ModelFolder,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    overwrite: bool = False,
) -> None:
    """Write the folder.

    Args:
        destination: the folder to write; its parents are created.
        base: the student's starting point, for UNet configuration and scheduler.
        text: the checkpoint whose text encoders and tokenizers condition the student.
        vae: the checkpoint whose VAE decodes what it makes.
        weights: the UNet's weights, by name.
        dtype: the UNet's dtype in the folder; other networks stay as their source stores them.
        overwrite: True replaces an existing folder.

    Raises:
        ConfigError: when the destination exists and `overwrite` is off.
        StorageError: when the disk is full or refuses.
    """
    if destination.exists() and not overwrite:
        raise ConfigError(
            "the folder exists already",
            where=str(destination),
            action="choose another one with --output, or replace it with --overwrite",
        )
    # Written under a temporary name, then flushed, and only then given its own.
    temporary = destination.parent / f"{TEMPORARY_PREFIX}{new_token()}"
    with storage_errors(destination):
        temporary.mkdir(parents=True)
        try:
            _write(temporary, base, text, vae, weights, dtype)
            follow_umask(temporary)
            _flush(temporary)
            _replace(destination, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(destination: Path, temporary: Path) -> None:
    """Give a folder its name; the old one is deleted, but never before it is replaced."""
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    try:
        with suppress(FileNotFoundError):
            destination.rename(replaced)
        temporary.rename(destination)
    except BaseException:  # Ctrl-C too
        if not destination.exists() and replaced.exists():
            replaced.rename(destination)
        raise
    finally:
        if destination.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def _write(
    folder: Path,
    base: ModelFolder,
    text: ModelFolder,
    vae: ModelFolder,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    _write_unet(folder / "unet", base.unet, weights, dtype)
    for component in (vae.vae, *text.text_encoders):
        _copy_component(component, folder / component.kind.name)
    for source in text.tokenizer_folders:
        copy_tokenizer(source, folder / source.name)
    shutil.copytree(base.folder / "scheduler", folder / "scheduler")
    _write_json(folder / "model_index.json", _model_index(base.folder))


def _write_unet(
    folder: Path, base: Component, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write the weights one by one: neither the base's nor a second copy is ever in memory."""
    _require_same_shapes(base, weights)
    folder.mkdir()
    stored = dtype_of(torch.empty(0, dtype=dtype))
    described = {name: (stored, tuple(weight.shape)) for name, weight in weights.items()}
    with (folder / f"{base.kind.weights_stem}.safetensors").open("xb") as file:
        write_one_by_one(file, described, lambda name: weights[name].to(dtype), _METADATA)
    # The base's own: this version would add fields that an older one does not know.
    _write_json(folder / "config.json", base.config)


def _require_same_shapes(base: Component, weights: Mapping[str, torch.Tensor]) -> None:
    expected = {name: tuple(each.shape) for name, each in base.on_meta().state_dict().items()}
    found = {name: tuple(each.shape) for name, each in weights.items()}
    if found != expected:
        differing = {name for name, _ in found.items() ^ expected.items()}
        raise IncompatibleError(
            f"{len(differing)} weights of other names or shapes, first {min(differing)!r}",
            expected="exactly the weights of the student's config.json",
            where=str(base.folder),
            action="export with the configuration of the run (its config.json)",
        )


def _copy_component(component: Component, folder: Path) -> None:
    folder.mkdir()
    tensors = component.hub_tensors()
    described = {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}
    with (folder / f"{component.kind.weights_stem}.safetensors").open("xb") as file:
        write_one_by_one(
            file, described, lambda name: component.finite_weight(tensors[name]), _METADATA
        )
    _write_json(folder / "config.json", _loading_as_float32(component.config))


def _loading_as_float32(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make a network of transformers load as float32 when the caller asks for no dtype.

    Version 5 follows the configuration, then the files, while diffusers' networks load as
    float32: half precision in either place would give a pipeline of two dtypes.
    """
    if "architectures" not in config:
        return dict(config)
    fields = {name: field for name, field in config.items() if name != "dtype"}
    return {**fields, "torch_dtype": "float32"}


def _model_index(base: Path) -> dict[str, Any]:
    """What the folder holds: the seven parts of SDXL, and none of the base's optional ones."""
    index = read_json(base / "model_index.json")
    scheduler = read_json(base / "scheduler" / "scheduler_config.json").get(
        "_class_name", "EulerDiscreteScheduler"
    )
    return {
        **{name: entry for name, entry in index.items() if not isinstance(entry, list)},
        "scheduler": index.get("scheduler") or ["diffusers", scheduler],
        **PIPELINE_PARTS,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    """Flush every file to the disk before the folder gets its name."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
