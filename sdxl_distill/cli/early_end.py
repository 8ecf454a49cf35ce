"""A run that is asked to end early: what is kept, and the command that continues it, in words."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from sdxl_distill.cli.command import say
from sdxl_distill.cli.typed_command import as_text, typed_command, with_resume
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.errors import Preempted
from sdxl_distill.runtime.world import World
from sdxl_distill.train.run_folder import RunFolder
from sdxl_distill.train.stop_signals import StopSignals

INTERRUPTED = 130
"""Exit code of a run that ended at once: the shell's for Ctrl-C."""


class EarlyEnd:
    """Listens to signals within its block, and puts what they do to a run into words.

    Args:
        config: the run's configuration.
        argv: the command's arguments.

    Attributes:
        signals: the stop signals that `train_student` listens to.
        is_trained: True once all steps are done; the caller sets it.
        exit_code: the command's exit code; None for 0.

    Raises:
        Preempted: after the block, when a signal ended it and running the command again continues
            it; on the main rank only, since one message is enough.
    """

    def __init__(self, config: DistillConfig, argv: Sequence[str]) -> None:
        self.signals = StopSignals(self._announce, self._abandon)
        self.is_trained = False
        self.exit_code: int | None = None
        self._folder = RunFolder.of(config)
        self._steps_before = self._folder.checkpoints().steps()
        self._command = typed_command("train", argv)
        self._is_main = World.from_environment().is_main
        self._listening = self.signals.listening()

    def __enter__(self) -> EarlyEnd:
        self._listening.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._listening.__exit__(kind, error, traceback)
        if isinstance(error, KeyboardInterrupt) and self.signals.at_once:
            self.exit_code = self._say_unsaved()
            return True
        if not isinstance(error, KeyboardInterrupt | Preempted):
            return False
        if not self._is_main:
            self.exit_code = Preempted.exit_code
            return True
        if isinstance(error, Preempted):
            found = error.found
        else:
            when = "before the export" if self.is_trained else "before it took a step"
            found = f"asked to stop {when}; {self._kept()}"
        raise Preempted(found, where=str(self._folder.path), action=self._go_on()) from error

    def _announce(self) -> None:
        if self._is_main:
            say(
                "\nasked to stop: this step is finished and saved first; Ctrl-C again ends the run "
                f"at once, and then {self._kept()}"
            )

    def _abandon(self) -> int:
        if self.signals.at_once:
            return self._say_unsaved()
        if self._is_main:
            stopped = Preempted(
                f"asked to stop; {self._kept()}",
                where=str(self._folder.path),
                action=self._go_on(),
            )
            say(f"Preempted: {stopped}")
        return Preempted.exit_code

    def _say_unsaved(self) -> int:
        if self._is_main:
            say(f"interrupted, and not saved; {self._kept()}\n  → {self._go_on()}")
        return INTERRUPTED

    def _kept(self) -> str:
        steps = self._folder.checkpoints().steps()
        if not steps:
            return "there is no checkpoint"
        return f"the checkpoint of step {steps[-1]} is kept"

    def _go_on(self) -> str:
        """Return the command that continues from what is saved now."""
        has_begun = self._folder.checkpoints().steps() != self._steps_before
        return as_text(with_resume(self._command) if has_begun else self._command)
