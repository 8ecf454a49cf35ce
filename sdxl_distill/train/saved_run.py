"""How a run is saved and gone on with: from its state to a checkpoint, and back."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn

from sdxl_distill.errors import StorageError
from sdxl_distill.optimizer.adamw import AdamW
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.train.agreement import sum_over_ranks
from sdxl_distill.train.average_exchange import gathered_averages
from sdxl_distill.train.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint
from sdxl_distill.train.ema import Ema
from sdxl_distill.train.run_folder import require_equal
from sdxl_distill.train.run_lock import RunLock
from sdxl_distill.train.run_state import Position, RunState
from sdxl_distill.train.stop_signals import warn_of_short_shutdown

_RESUME_WITH_THE_SAME_DATA: Final = (
    "resume with the data, seed and global batch of the run; where only the data grew or changed, "
    "--set data.on_change=next_epoch goes on with it at the next epoch"
)

_log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """All that a run changes; with the run's identity it is the whole of a checkpoint.

    Attributes:
        student: the UNet, not wrapped for data parallelism.
        optimizer: the optimizer of its weights.
        ema: this rank's share of the moving average; None where none is kept.
        position: the steps that are done.
    """

    student: nn.Module
    optimizer: AdamW
    ema: Ema | None
    position: Position = field(default_factory=Position)


class SavedRun:
    """The checkpoints of one run, written by its main rank and resumed by all.

    Args:
        checkpoints: the folder that they lie in.
        identity: configuration, student, noise schedule and sets that determine the run's steps.
        stream: identity of the stream order.
        on_change: what to do where a resumed run finds other shards, as `data.on_change`.
        accelerator: the ranks.
        lock: the run folder's lock, on the main rank; None where no other process writes there.
    """

    def __init__(
        self,
        checkpoints: CheckpointFolder,
        identity: dict[str, Any],
        stream: dict[str, Any],
        on_change: Literal["error", "next_epoch"],
        accelerator: Accelerator,
        lock: RunLock | None,
    ) -> None:
        self.checkpoints = checkpoints
        self.identity = identity
        self.stream = stream
        self._on_change = on_change
        self._accelerator = accelerator
        self._lock = lock

    def save(self, state: TrainingState, stop: StopRequest) -> bool:
        """Write a checkpoint; the other ranks wait for it.

        Returns:
            Whether any rank was asked to stop before this was done.

        Raises:
            StorageError: when the disk is full or refuses.
        """
        started_seconds = time.perf_counter()
        averages = self._averages(state)
        if self._accelerator.is_main_process:
            self._write(state, averages)
            warn_of_short_shutdown(time.perf_counter() - started_seconds)
        num_stopped = torch.tensor(float(stop.requested), device=self._accelerator.device)
        return bool(sum_over_ranks(self._accelerator, num_stopped) > 0)

    def resume(self, reference: str, state: TrainingState) -> None:
        """Load a checkpoint: `latest`, or the path of one, to which the run is rewound.

        Args:
            reference: `latest` or the path.
            state: what is replaced by the checkpoint's.

        Raises:
            ConfigError: when there is none.
            CorruptError: when it, and for `latest` every older one, is damaged.
            IncompatibleError: when it belongs to another configuration, student or stream.
            StorageError: when the ranks do not see the same checkpoints.
        """
        if reference == "latest":
            path, checkpoint = self.checkpoints.load_latest()
        else:
            path, checkpoint = Path(reference), load_checkpoint(Path(reference))
        found = RunState.from_json(checkpoint.state, str(path))
        require_equal(found.identity, self.identity, str(path))
        state.position = self._position(found, str(path))
        state.student.load_state_dict(checkpoint.tensors["student"])
        state.optimizer.load_state_tensors(checkpoint.tensors["optimizer"], found.optimizer)
        if state.ema is not None:
            state.ema.load(checkpoint.tensors.get("ema", {}))
        self._require_one_step(state.position, str(path))
        if reference != "latest":
            self._rewind(path, state)

    def _averages(self, state: TrainingState) -> dict[str, torch.Tensor] | None:
        """Bring the ranks' shares of the average together on the main rank."""
        if state.ema is None:
            return None
        return gathered_averages(state.ema, state.student, self._accelerator)

    def _write(self, state: TrainingState, averages: dict[str, torch.Tensor] | None) -> None:
        if self._lock is not None:
            self._lock.require_held()
        tensors = {
            "student": state.student.state_dict(),
            "optimizer": state.optimizer.state_tensors(),
        }
        if averages is not None:
            tensors["ema"] = averages
        run_state = RunState(
            state.position, self.identity, self.stream, state.optimizer.state_scalars()
        )
        checkpoint = Checkpoint(run_state.to_json(), tensors)
        self.checkpoints.save(state.position.global_step, checkpoint)

    def _rewind(self, path: Path, state: TrainingState) -> None:
        """Set later checkpoints of this run aside, so that none of them is its latest."""
        step = state.position.global_step
        is_own = path.resolve().parent == self.checkpoints.path.resolve()
        averages = None if is_own else self._averages(state)
        if not self._accelerator.is_main_process:
            return
        aside = self.checkpoints.set_aside(step + is_own)
        if aside is None:
            return
        _log.warning(
            "the run goes on from step %d: its later checkpoints are set aside in %s, which you "
            "may remove; TensorBoard hides the later points",
            step,
            aside,
        )
        if not is_own:
            self._write(state, averages)

    def _position(self, found: RunState, where: str) -> Position:
        """Return where to go on: with changed data, if that is allowed, at the next epoch."""
        now = self.stream
        if self._on_change == "next_epoch":
            changed = {name: now[name] for name in ("buckets", "num_draws")}
            require_equal({**found.stream, **changed}, now, where)
            if found.stream != now:
                return Position(found.position.global_step, found.position.epoch + 1, 0)
        require_equal(found.stream, now, where, _RESUME_WITH_THE_SAME_DATA)
        return found.position

    def _require_one_step(self, position: Position, where: str) -> None:
        """Refuse ranks that resumed different checkpoints, as from folders that are not shared."""
        own = torch.tensor([position.global_step], device=self._accelerator.device)
        steps = cast("torch.Tensor", self._accelerator.gather(own)).tolist()
        if len(set(steps)) > 1:
            raise StorageError(
                f"the ranks resumed steps {steps}",
                expected="the same checkpoint on every rank",
                where=where,
                action="keep the run folder on a file system that all nodes share",
            )
