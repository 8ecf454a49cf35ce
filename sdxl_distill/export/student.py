"""Which weights of a run are exported, and from which checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import torch

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.errors import ConfigError, IncompatibleError
from sdxl_distill.export.diffusers_folder import export_diffusers_folder
from sdxl_distill.models.model_folder import ModelFolder
from sdxl_distill.train.checkpoint import load_checkpoint
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
    # A checkpoint of this student.
    folder = RunFolder.of(config)
    if checkpoint == "latest":
        path, saved = folder.checkpoints().load_latest()
    else:
        path, saved = Path(checkpoint), load_checkpoint(Path(checkpoint))
    base = ModelFolder.resolve(config.student.checkpoint_path)
    if saved.state["identity"]["student"] != base.unet_fingerprint():
        raise IncompatibleError(
            "the checkpoint belongs to a student that started from other weights",
            expected=f"weights trained from {base.reference}",
            where=str(path),
            action="export with the configuration of the run (its config.json)",
        )
    # The average or the weights themselves.
    chosen = weights or ("ema" if config.student.use_ema else "raw")
    tensors = saved.tensors.get("ema" if chosen == "ema" else "student")
    if tensors is None:
        raise ConfigError(
            "the run kept no moving average",
            where=str(path),
            action="export its weights with --weights raw",
        )
    # With the other networks that they were trained with.
    destination = destination or folder.export
    text = ModelFolder.resolve(config.text_source)
    export_diffusers_folder(
        destination, base, text, tensors, DTYPES[config.export.dtype], overwrite=overwrite
    )
    return destination
