"""The folder of one run: resolved configuration, fingerprints, checkpoints, export."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.loader import resolved_json
from sdxl_distill.errors import ConfigError, CorruptError, IncompatibleError
from sdxl_distill.fingerprint import canonical_json, differing_fields
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, Directory
from sdxl_distill.train.checkpoint import (
    CheckpointFolder,
    name_of_step,
    read_state,
    step_of_checkpoint,
)
from sdxl_distill.train.run_state import RunState

# What may change between a run and its continuation without changing what a step does.
_FREE_FIELDS = (
    "device",
    "tf32",
    "run",
    "student.checkpoint_path",
    "student.text_encoder_id",
    "student.ema_device",
    "student.ema_every",
    "data.latent_cache",
    "data.on_change",
    "data.on_missing",
    "data.reader_threads",
    "data.prefetch_batches",
    "training.batch_size",  # the global batch is part of the stream's identity
    "training.gradient_accumulation_steps",
    "training.compile",
    "training.compile_optimizer",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.validation.every",
    "training.validation.max_records",
    "training.tensorboard",
    "export",
)


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it makes."""

    path: Path

    @classmethod
    def of(cls, config: DistillConfig) -> RunFolder:
        """Return the folder that a configuration names."""
        return cls(Path(config.run.output_root) / config.run.name)

    def prepare(self) -> None:
        """Make the folder, and remove what a killed process left half-written in it.

        Raises:
            StorageError: when the disk refuses.
        """
        with Directory(self.path, create=True) as folder:
            for name in folder.names():
                # Folders of that name are exports, which need no lock and may be in progress.
                if name.startswith(TEMPORARY_PREFIX) and not (self.path / name).is_dir():
                    folder.remove(name)
        self.checkpoints().clear_leftovers()

    @property
    def export(self) -> Path:
        """The exported student."""
        return self.path / "export"

    def checkpoints(self, keep: int = 2) -> CheckpointFolder:
        """Return the folder of checkpoints."""
        return CheckpointFolder(self.path / "checkpoints", keep)

    def tensorboard(self, base_dir: str) -> Path:
        """Return the folder of the run's event files below `base_dir`."""
        return Path(base_dir) / self.path.name

    def require_new(self) -> None:
        """Refuse to train into a folder that already holds checkpoints.

        Raises:
            ConfigError: when it does.
        """
        steps = self.checkpoints().steps()
        if steps:
            raise ConfigError(
                f"the run already has checkpoints, the last of step {steps[-1]}",
                where=str(self.path),
                action="continue it with `--resume latest`, or choose another run.name",
            )

    def start(self, resume: str | None, num_steps: int) -> str | None:
        """Return the checkpoint to go on with, None for a new run, and refuse to do nothing.

        Args:
            resume: `latest`, the path of a checkpoint, or None, as for `train_student`.
            num_steps: number of steps of the whole run.

        Raises:
            ConfigError: when a new run exists already, the named checkpoint does not, or all steps
                are done.
            CorruptError, StorageError: when the checkpoint's state cannot be read.
        """
        if resume is None:
            self.require_new()
            return None
        checkpoints = self.checkpoints()
        if resume == "latest":
            steps = checkpoints.steps()
            if not steps:
                checkpoints.require_none_aside()
                return None
            done, path = steps[-1], checkpoints.path / name_of_step(steps[-1])
            is_short = num_steps < done
        else:
            path = Path(resume)
            done = step_of_checkpoint(path)
            # The export that follows takes the latest checkpoint, which this one need not be.
            is_short = num_steps <= done
        if is_short:
            raise ConfigError(
                f"training.num_steps is {num_steps}, but {done} steps are done",
                expected=f"more than {done}",
                where=str(path),
                action="raise training.num_steps to train on; `export-student --checkpoint PATH` "
                "exports a checkpoint, also an earlier one",
            )
        return resume

    def saved_state(self, start: str) -> RunState | None:
        """Return what the checkpoint that `start` returned says besides its tensors.

        None when it cannot be read: loading it says so, or falls back to an older one.
        """
        for path in self.checkpoints().newest_first() if start == "latest" else [Path(start)]:
            with suppress(CorruptError):
                return RunState.from_json(read_state(path), str(path))
        return None

    def write(self, config: DistillConfig, fingerprints: dict[str, Any]) -> None:
        """Save the resolved configuration and the fingerprints of all that goes into the run."""
        with Directory(self.path, create=True) as folder:
            folder.replace_bytes("config.json", resolved_json(config).encode())
            folder.replace_bytes("fingerprints.json", canonical_json(fingerprints))


def decisive_fields(config: DistillConfig) -> dict[str, Any]:
    """Return the configuration that determines what a step does, as JSON values.

    Places are left out: a run may move. What a place held is in the fingerprints.
    """
    fields = config.model_dump(mode="json")
    fields["training"]["warmup_steps"] = config.training.num_warmup_steps
    if config.training.lr_schedule == "constant":
        del fields["training"]["num_steps"]
    for path in _FREE_FIELDS:
        *sections, name = path.split(".")
        section = fields
        for each in sections:
            section = section[each]
        del section[name]
    for teacher in fields["teachers"]:
        del teacher["cache_dir"]
    # Differences are named by path, which a list does not give; teachers have ids.
    fields["teachers"] = {teacher.pop("teacher_id"): teacher for teacher in fields["teachers"]}
    return fields


def require_same_configuration(config: DistillConfig, saved: RunState, where: str) -> None:
    """Refuse to resume with another configuration, before anything is loaded.

    Exact masters that are `auto` are those of the checkpoint.

    Raises:
        IncompatibleError: with every field that differs and both values.
    """
    found = saved.identity.get("config", {})
    fields = decisive_fields(config)
    if config.training.exact_masters == "auto" and isinstance(found.get("training"), dict):
        fields["training"]["exact_masters"] = found["training"].get("exact_masters")
    require_equal({"config": found}, {"config": fields}, where)


RESUME_AS_CONFIGURED = (
    "resume with the configuration of the run (its config.json), or start a new run"
)


def require_equal(
    found: dict[str, Any],
    expected: dict[str, Any],
    where: str,
    action: str = RESUME_AS_CONFIGURED,
) -> None:
    """Refuse to resume with another configuration, student or stream.

    Args:
        found: the identity that the checkpoint was made with.
        expected: the identity of this run.
        where: the checkpoint.
        action: the advice when they differ.

    Raises:
        IncompatibleError: with every field that differs and both values.
    """
    differences = differing_fields(found, expected)
    if differences:
        lines = "; ".join(
            f"{path} was {was!r} and is now {now!r}" for path, was, now in differences
        )
        raise IncompatibleError(
            f"this run differs from its checkpoint: {lines}",
            where=where,
            action=action,
        )
