"""Which weights of a run are exported, and from which checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import torch

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.export.diffusers_folder import export_diffusers_folder
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.train.checkpoint import (
    load_tensors,
    read_state,
    verify_tensors,
    warn_of_fallback,
)
from sdxl_distill.train.run_folder import RunFolder

Weights = Literal["ema", "raw"]

DTYPES: Final = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def export_student(
    config: DistillConfig,
    *,
    checkpoint: str = "latest",
    weights: Weights | None = None,
    destination: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the student of a run as a diffusers folder and return its path.

    Args:
        config: the run's configuration; `export.dtype` is the dtype of the folder.
        checkpoint: `latest`, or the path of one.
        weights: the moving average or the weights themselves; None takes the average if it is on.
        destination: the folder to write; None takes `{run}/export`.
        overwrite: True replaces an existing folder.

    Raises:
        ConfigError: when there is no checkpoint or average, or the destination exists.
        CorruptError: when the checkpoint is damaged.
        IncompatibleError: when it belongs to another student.
        StorageError: when the disk is full or refuses.
    """
    # A checkpoint of this student, of which only what is exported is read.
    chosen = weights or ("ema" if config.student.use_ema else "raw")
    stem = "ema" if chosen == "ema" else "student"
    path = _whole_checkpoint(RunFolder.of(config), checkpoint, stem)
    base = ModelFolder.resolve(config.student.checkpoint_path)
    if read_state(path)["identity"]["student"] != base.unet_fingerprint():
        raise IncompatibleError(
            "the checkpoint belongs to a student that started from other weights",
            expected=f"weights trained from {base.reference}",
            where=str(path),
            action="export with the configuration of the run (its config.json)",
        )
    tensors = load_tensors(path, stem).get(stem)
    if tensors is None:
        raise ConfigError(
            "the run kept no moving average",
            where=str(path),
            action="export its weights with --weights raw",
        )
    # With the other networks that they were trained with.
    destination = destination or RunFolder.of(config).export
    text = ModelFolder.resolve(config.text_source)
    vae = ModelFolder.resolve(config.vae_source)
    export_diffusers_folder(
        destination, base, text, vae, tensors, DTYPES[config.export.dtype], overwrite=overwrite
    )
    return destination


def require_exportable(config: DistillConfig) -> None:
    """Check, before a run is trained, that what its export needs besides the student is there.

    Raises:
        ConfigError: when the VAE or a text encoder is missing; names the key.
        CorruptError, IncompatibleError: when its files or its class are wrong.
    """
    try:
        ModelFolder.resolve(config.vae_source).vae.require_complete()
    except ConfigError as error:
        raise ConfigError(
            f"the export has no VAE: {error.found}",
            where=error.where,
            action="set export.vae_id to a checkpoint that has one, or train with --no-export",
        ) from error
    for encoder in ModelFolder.resolve(config.text_source).text_encoders:
        encoder.require_complete()


def _whole_checkpoint(folder: RunFolder, checkpoint: str, stem: str) -> Path:
    """Return the checkpoint to export: the named one, or the newest whose weights are whole."""
    if checkpoint != "latest":
        verify_tensors(Path(checkpoint), stem)
        return Path(checkpoint)
    faults: list[CorruptError] = []
    for path in folder.checkpoints().newest_first():
        try:
            verify_tensors(path, stem)
        except CorruptError as error:
            warn_of_fallback(error)
            faults.append(error)
        else:
            return path
    raise faults[0]
