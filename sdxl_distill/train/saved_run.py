"""How a run is saved and gone on with: from its state to a checkpoint, and back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn

from sdxl_distill.errors import CorruptError, StorageError
from sdxl_distill.optimizer.adamw import AdamW
from sdxl_distill.runtime.stop_request import StopRequest
from sdxl_distill.train.agreement import sum_over_ranks
from sdxl_distill.train.average_exchange import all_averages
from sdxl_distill.train.background_save import BackgroundSave, Snapshot
from sdxl_distill.train.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    load_tensors,
    read_state,
    verify_tensors,
    warn_of_fallback,
)
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

    Attributes:
        checkpoints: the folder that they lie in.
        stall_seconds: time that the last `save` held the run up.

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
        self._background = BackgroundSave()
        self._snapshot = Snapshot()
        self._is_copied = False
        self.stall_seconds = 0.0

    def save(self, state: TrainingState, stop: StopRequest) -> bool:
        """Copy the state to main memory and write the copy while the run goes on.

        Where main memory is short, and for the one before that is not written yet, it waits;
        `stall_seconds` says for how long.

        Returns:
            Whether any rank was asked to stop before this was done.

        Raises:
            StorageError: when the disk was full or refused, now or for the checkpoint before.
        """
        started_seconds = time.perf_counter()
        self._background.finish()
        write = self._prepared(state)
        if write is not None:
            self._background.start(write)
            if not self._is_copied:
                self._background.finish()
        num_stopped = torch.tensor(float(stop.requested), device=self._accelerator.device)
        stops = bool(sum_over_ranks(self._accelerator, num_stopped) > 0)
        self.stall_seconds = time.perf_counter() - started_seconds
        return stops

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Have all that the block saves committed at its end, also when it fails on this rank.

        Not at a KeyboardInterrupt: whoever insists is not kept waiting.
        """
        try:
            yield
        except Exception:
            self._background.finish()
            raise
        self.finish()

    def check(self) -> None:
        """Raise what the write in the background met, if it has ended; costs nothing.

        Raises:
            StorageError: when the disk was full or refused.
        """
        self._background.check()

    def finish(self) -> None:
        """Wait, on all ranks, until the last checkpoint is committed.

        Raises:
            StorageError: when the disk was full or refused.
        """
        self._background.finish()
        self._accelerator.wait_for_everyone()

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
        # Nothing is touched before the checkpoint is known to be this run's, and whole.
        path, found, position = self._whole_checkpoint(reference)
        tensors = load_tensors(path)
        state.student.load_state_dict(tensors["student"])
        state.optimizer.load_state_tensors(tensors["optimizer"], found.optimizer)
        if state.ema is not None:
            state.ema.load(tensors.get("ema", {}))
        state.position = position
        if reference != "latest":
            self._rewind(path, state)

    def _whole_checkpoint(self, reference: str) -> tuple[Path, RunState, Position]:
        """Return the first checkpoint that is whole, its state, and where to go on from it.

        The main rank reads its bytes, for all; the others read no more than they keep.
        """
        paths = [Path(reference)]
        if reference == "latest":
            paths = self.checkpoints.newest_first()
        faults: list[CorruptError] = []
        for path in paths:
            fault = found = position = None
            try:
                found = RunState.from_json(read_state(path), str(path))
                require_equal(found.identity, self.identity, str(path))
                position = self._position(found, str(path))
                if self._accelerator.is_main_process:
                    verify_tensors(path)
            except CorruptError as error:
                fault = error
            self._require_one_step(-1 if position is None else position.global_step, str(path))
            num_faults = sum_over_ranks(
                self._accelerator,
                torch.tensor(float(fault is not None), device=self._accelerator.device),
            )
            if found is not None and position is not None and not num_faults:
                return path, found, position
            faults.append(fault or _damaged_for_main(path))
            if reference == "latest":
                warn_of_fallback(faults[-1])
        raise faults[0]

    def _prepared(self, state: TrainingState) -> Callable[[], None] | None:
        """Return what writes the present state, on the main rank; all ranks must call it."""
        is_main = self._accelerator.is_main_process
        tensors = {
            "student": state.student.state_dict(),
            "optimizer": state.optimizer.state_tensors(),
        }
        if is_main:
            self._is_copied = self._snapshot.fits(_flat({**tensors, "ema": _meta_averages(state)}))
            if self._is_copied:
                tensors = {
                    stem: {
                        name: self._snapshot.take(f"{stem}/{name}", tensor)
                        for name, tensor in named.items()
                    }
                    for stem, named in tensors.items()
                }
        # The averages come from all ranks, one buffer after the other.
        if state.ema is not None:
            tensors["ema"] = {}
            like = _meta_averages(state)
            for name, average in all_averages(state.ema, like, self._accelerator):
                if is_main:
                    tensors["ema"][name] = self._kept_average(state.ema, name, average)
        if not is_main:
            return None
        run_state = RunState(
            state.position, self.identity, self.stream, state.optimizer.state_scalars()
        )
        checkpoint = Checkpoint(run_state.to_json(), tensors)
        return partial(self._write, state.position.global_step, checkpoint)

    def _kept_average(self, ema: Ema, name: str, average: torch.Tensor) -> torch.Tensor:
        if self._is_copied:
            return self._snapshot.take(f"ema/{name}", average)
        own = ema.averages.get(name)
        return average.to("cpu", copy=True) if own is None else own

    def _write(self, step: int, checkpoint: Checkpoint) -> None:
        if self._lock is not None:
            self._lock.require_held()
        started_seconds = time.perf_counter()
        self.checkpoints.save(step, checkpoint)
        seconds = time.perf_counter() - started_seconds
        num_bytes = sum(each.nbytes for each in _flat(checkpoint.tensors).values())
        _log.info(
            "checkpoint of step %d: %.1f GB written in %.1f s", step, num_bytes / 1e9, seconds
        )
        warn_of_short_shutdown(seconds)

    def _rewind(self, path: Path, state: TrainingState) -> None:
        """Set later checkpoints of this run aside, so that none of them is its latest."""
        step = state.position.global_step
        is_own = path.resolve().parent == self.checkpoints.path.resolve()
        write = None if is_own else self._prepared(state)
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
        if write is not None:
            write()

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

    def _require_one_step(self, step: int, where: str) -> None:
        """Refuse ranks that resumed different checkpoints, as from folders that are not shared."""
        own = torch.tensor([step], device=self._accelerator.device)
        steps = cast("torch.Tensor", self._accelerator.gather(own)).tolist()
        if len(set(steps)) > 1:
            raise StorageError(
                f"the ranks resumed steps {steps}",
                expected="the same checkpoint on every rank",
                where=where,
                action="keep the run folder on a file system that all nodes share",
            )


def _flat(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        f"{stem}/{name}": each for stem, named in tensors.items() for name, each in named.items()
    }


def _meta_averages(state: TrainingState) -> dict[str, torch.Tensor]:
    """Return the averages of all ranks as tensors without storage."""
    if state.ema is None:
        return {}
    return {
        name: weight.detach().to("meta", torch.float32)
        for name, weight in state.student.named_parameters()
    }


def _damaged_for_main(path: Path) -> CorruptError:
    return CorruptError(
        "the main process found it damaged", where=str(path), action="look at its message"
    )
