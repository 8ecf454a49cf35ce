"""A complete diffusers folder: the trained UNet with the VAE, text encoders and scheduler it needs.

`StableDiffusionXLPipeline.from_pretrained` loads it. Written beside its name and renamed, so
that the folder is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from sdxl_distill.errors import ConfigError, StorageError
from sdxl_distill.file_mode import follow_umask
from sdxl_distill.fsio import TEMPORARY_PREFIX, new_token, storage_errors
from sdxl_distill.models.checkpoint import Checkpoint
from sdxl_distill.models.component import Component
from sdxl_distill.models.tokenizer import load_tokenizer


def export_diffusers_folder(
    destination: Path,
    base: Checkpoint,
    text: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    overwrite: bool = False,
) -> None:
    """Write the folder.

    Args:
        destination: where; its parents are made.
        base: what the student started from: UNet configuration, VAE, scheduler.
        text: whose text encoders and tokenizers condition the student.
        weights: of the UNet, by name.
        dtype: of every tensor in the folder.
        overwrite: replace a folder that is there.

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
    temporary = destination.parent / f"{TEMPORARY_PREFIX}{new_token()}"
    with storage_errors(destination):
        temporary.mkdir(parents=True)
        try:
            _write(temporary, base, text, weights, dtype)
            follow_umask(temporary)
            _flush(temporary)
            if destination.exists():
                replaced = temporary.with_name(f"{temporary.name}-replaced")
                destination.rename(replaced)
                temporary.rename(destination)
                shutil.rmtree(replaced)
            else:
                temporary.rename(destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path,
    base: Checkpoint,
    text: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    unet = base.unet.load(dtype, "cpu")
    unet.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
    _save(unet, folder / "unet")
    del unet
    for component in (base.vae, *text.text_encoders):
        _save_component(component, folder, dtype)
    for source in text.tokenizer_folders:
        load_tokenizer(source).save_pretrained(folder / source.name)
    shutil.copytree(base.folder / "scheduler", folder / "scheduler")
    shutil.copyfile(base.folder / "model_index.json", folder / "model_index.json")


def _save_component(component: Component, folder: Path, dtype: torch.dtype) -> None:
    _save(component.load(dtype, "cpu"), folder / component.kind.name)


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the folder gets its name."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _save(module: torch.nn.Module, folder: Path) -> None:
    # diffusers' and transformers' models share this method, torch's base class lacks it.
    try:
        cast("Any", module).save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:
        raise StorageError(
            f"the weights could not be written ({error})",
            where=str(folder),
            action="free some space on this disk, then export again",
        ) from error
