"""Checkpoints: a folder of safetensors and JSON that exists whole or not at all.

Written as `.tmp-{token}/`, every file flushed, its SHA-256 in `files.json`, then renamed to
`step-{step:08d}/`. Loading verifies the digests; a damaged checkpoint gives way to the one
before it. Never pickle: a checkpoint may come from a stranger.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdxl_distill.errors import ConfigError, CorruptError
from sdxl_distill.fingerprint import canonical_json
from sdxl_distill.limits import MAX_CHECKPOINT_JSON_BYTES, MAX_STEPS
from sdxl_distill.shards.safetensors_file import write_safetensors
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, Directory, new_token
from sdxl_distill.storage.regular_file import read_bytes, storage_errors

CHECKPOINT_FORMAT_VERSION = 1
_FILES = "files.json"
_STATE = "state.json"
_LATEST = "latest"
_TENSORS_SUFFIX = ".safetensors"
_ASIDE = "set-aside-"
_MAX_LATEST_BYTES = 64
_STEP_FOLDER = re.compile(r"step-([0-9]{8})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        state: JSON values: position, fingerprints, optimizer scalars.
        tensors: file stem → named tensors: `student`, `optimizer`, and `ema` when it is on.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]


class CheckpointFolder:
    """The folder `{run}/checkpoints` and the checkpoints in it.

    Args:
        path: the folder's path; made when the first checkpoint is saved.
        keep: number of checkpoints that remain; at least two, so that a damaged one has a fallback.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the step of every checkpoint there, ascending."""
        if not self.path.is_dir():
            return []
        matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of a step, point `latest` at it and remove the oldest.

        One of the same step is replaced and those of later steps are removed: the run went on from
        an older one, because they are damaged or because it was told to.

        Raises:
            StorageError: when the disk is full or refuses; the other checkpoints are untouched.
        """
        name = name_of_step(step)
        with Directory(self.path, create=True) as folder:
            self._write(folder, name, checkpoint)
            folder.replace_bytes(_LATEST, name.encode())
        steps = self.steps()
        for other in set(steps).difference([each for each in steps if each <= step][-self.keep :]):
            self._remove(name_of_step(other))
        return self.path / name

    def set_aside(self, step: int) -> Path | None:
        """Move the checkpoints from a step on into a folder of their own.

        They no longer belong to the run, but nothing is lost.

        Returns:
            The folder; None when there was none to move.

        Raises:
            StorageError: when the disk refuses.
        """
        steps = [each for each in self.steps() if each >= step]
        if not steps:
            return None
        with storage_errors(self.path), Directory(self.path) as folder:
            names = folder.names()
            number = next(each for each in count(1) if f"{_ASIDE}{each}" not in names)
            aside = self.path / f"{_ASIDE}{number}"
            aside.mkdir()
            # The last one first: if this is killed, the earlier ones are still in place.
            for each in reversed(steps):
                (self.path / name_of_step(each)).rename(aside / name_of_step(each))
            folder.sync()
        return aside

    def require_none_aside(self) -> None:
        """Refuse to start again a run whose checkpoints were all set aside.

        Raises:
            ConfigError: naming the folder.
        """
        aside = sorted(self.path.glob(f"{_ASIDE}*/step-*"))
        if aside:
            raise ConfigError(
                "the run has no checkpoint but those that were set aside",
                where=str(self.path),
                action=f"go on with `--resume {aside[-1]}`, or start again in another run.name",
            )

    def clear_leftovers(self) -> None:
        """Remove what a killed process left behind.

        Raises:
            StorageError: when the disk refuses.
        """
        for leftover in self.path.glob(f"{TEMPORARY_PREFIX}*"):
            with storage_errors(leftover):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()

    def newest_first(self) -> list[Path]:
        """Return the checkpoints to try: the one that `latest` names, then older, then later ones.

        Raises:
            ConfigError: when there is none at all.
        """
        latest = self._latest_step()
        steps = sorted(self.steps(), key=lambda step: (step <= latest, step), reverse=True)
        if not steps:
            raise ConfigError(
                "there is no checkpoint",
                where=str(self.path),
                action="start the run without --resume, or name another run",
            )
        return [self.path / name_of_step(step) for step in steps]

    def load_latest(self) -> tuple[Path, Checkpoint]:
        """Load the checkpoint that `latest` names, or the newest other one that is whole.

        Raises:
            ConfigError: when there is none at all.
            CorruptError: when every one of them is damaged.
        """
        faults: list[CorruptError] = []
        for path in self.newest_first():
            try:
                return path, load_checkpoint(path)
            except CorruptError as error:
                warn_of_fallback(error)
                faults.append(error)
        raise faults[0]

    def _latest_step(self) -> int:
        """Return the step that `latest` names; the largest possible one when it names none."""
        try:
            name = read_bytes(self.path / _LATEST, _MAX_LATEST_BYTES).decode("ascii", "replace")
        except (FileNotFoundError, CorruptError):
            name = ""
        match = _STEP_FOLDER.fullmatch(name)
        return int(match[1]) if match else MAX_STEPS

    def _write(self, folder: Directory, name: str, checkpoint: Checkpoint) -> None:
        temporary = self.path / f"{TEMPORARY_PREFIX}{new_token()}"
        with storage_errors(self.path / name):
            temporary.mkdir()
            try:
                _write_files(temporary, checkpoint)
                if folder.exists(name):
                    self._remove(name)
                temporary.rename(self.path / name)
            except BaseException:
                # A full disk must not stay full because of what did not fit.
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            folder.sync()

    def _remove(self, name: str) -> None:
        """Remove a checkpoint so that a half-removed one is never taken for whole."""
        doomed = self.path / f"{TEMPORARY_PREFIX}{new_token()}"
        with storage_errors(self.path):
            (self.path / name).rename(doomed)
            shutil.rmtree(doomed)


def name_of_step(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the files of tensors, each in a thread of its own, then those that vouch for them."""
    with ThreadPoolExecutor(len(checkpoint.tensors), "write") as pool:
        digests = {
            f"{stem}{_TENSORS_SUFFIX}": pool.submit(
                _save_tensors, folder / f"{stem}{_TENSORS_SUFFIX}", tensors
            )
            for stem, tensors in checkpoint.tensors.items()
        }
    state = canonical_json(checkpoint.state)
    sha256 = {name: digest.result() for name, digest in digests.items()}
    sha256[_STATE] = hashlib.sha256(state).hexdigest()
    listed = {"format_version": CHECKPOINT_FORMAT_VERSION, "sha256": sha256}
    with Directory(folder) as directory:
        directory.replace_bytes(_STATE, state)
        directory.replace_bytes(_FILES, canonical_json(listed))


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    with storage_errors(path), path.open("xb") as file:
        digest = write_safetensors(file, tensors)
        file.flush()
        os.fsync(file.fileno())
    return digest


def warn_of_fallback(error: CorruptError) -> None:
    """Say that a checkpoint is damaged and that the one before it is tried."""
    _log.warning("%s\n  → falling back to the checkpoint before it", error)


def step_of_checkpoint(path: Path) -> int:
    """Return the number of steps done at a checkpoint, from its name or else its state.

    Raises:
        ConfigError: when there is no such folder.
        CorruptError: when its state is damaged.
    """
    _require_folder(path)
    match = _STEP_FOLDER.fullmatch(path.name)
    if match:
        return int(match[1])
    position = _read_json(path / _STATE).get("position")
    step = position.get("global_step") if isinstance(position, dict) else None
    if type(step) is not int:
        raise _damaged(path / _STATE, "no position")
    return step


def read_state(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says besides its tensors, and verify it; reads no tensor.

    Raises:
        ConfigError: when there is no such folder.
        CorruptError: when it is missing, damaged or of a later format.
    """
    _verify(path, _STATE, _digests(path)[_STATE])
    return _read_json(path / _STATE)


def verify_tensors(path: Path, stem: str | None = None) -> None:
    """Read every byte of a checkpoint's tensors, its files side by side.

    Args:
        path: the checkpoint.
        stem: the one file that is read, `student`; None reads all. One that is not there passes.

    Raises:
        ConfigError: when there is no such folder.
        CorruptError: when a file is missing or damaged.
    """
    digests = {name: digest for name, digest in _digests(path).items() if _is_asked(name, stem)}
    with ThreadPoolExecutor(len(digests), "verify") as pool:
        for _ in pool.map(partial(_verify, path), digests.keys(), digests.values()):
            pass


def load_tensors(path: Path, stem: str | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """Map the tensors of a verified checkpoint into memory: what is not used is not read.

    Args:
        path: the checkpoint.
        stem: the one file that is mapped, if it is there; None maps all.

    Raises:
        ConfigError: when there is no such folder.
        CorruptError: when a file is missing or cannot be parsed.
    """
    names = [name for name in _digests(path) if name != _STATE and _is_asked(name, stem)]
    return {name.removesuffix(_TENSORS_SUFFIX): _load_tensors(path / name) for name in names}


def _is_asked(name: str, stem: str | None) -> bool:
    return stem is None or name in (_STATE, f"{stem}{_TENSORS_SUFFIX}")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every byte of it. Raises as `read_state`."""
    state = read_state(path)
    verify_tensors(path)
    return Checkpoint(state, load_tensors(path))


def _digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint, as it lists them."""
    _require_folder(path)
    files = _read_json(path / _FILES)
    digests = files.get("sha256")
    if files.get("format_version") != CHECKPOINT_FORMAT_VERSION or not isinstance(digests, dict):
        raise CorruptError(
            f"format version {files.get('format_version')}",
            expected=str(CHECKPOINT_FORMAT_VERSION),
            where=str(path / _FILES),
        )
    for required in (_STATE, "student.safetensors", "optimizer.safetensors"):
        if required not in digests:
            raise _damaged(path / _FILES, f"{required} is not listed")
    return digests


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(
            "there is no such checkpoint",
            where=str(path),
            action="name a folder such as step-00001000, or resume with `latest`",
        )


def _verify(path: Path, name: str, digest: str) -> None:
    if Path(name).name != name or not (path / name).is_file():
        raise _damaged(path / Path(name).name, "the file is missing")
    with storage_errors(path / name), (path / name).open("rb") as file:
        found = _sha256(file)
    if found != digest:
        raise _damaged(path / name, f"sha256 {found}", f"sha256 {digest}")


def _damaged(path: Path, found: str, expected: str | None = None) -> CorruptError:
    return CorruptError(
        found, expected=expected, where=str(path), action="resume with an older checkpoint"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, MAX_CHECKPOINT_JSON_BYTES))
    except FileNotFoundError as error:
        raise _damaged(path, "the file is missing") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, f"not a safetensors file ({error})") from error


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
