"""The one exception tree of the package; every branch has its own exit code.

DistillError
├── ConfigError         2   the configuration or the command line is wrong
├── CorruptError        3   bytes on disk are not what was written
├── IncompatibleError   4   two things, each valid, do not belong together
├── StorageError        5   the operating system or the store refused
├── NumericalError      6   the model produced NaN or infinity, or ranks differ
└── Preempted          75   asked to stop; everything is saved, run again
"""

from __future__ import annotations

from typing import ClassVar


class DistillError(Exception):
    """An error that a user can act on.

    Args:
        found: the fault that was met, as a sentence without a full stop.
        expected: the value that would have been right.
        where: the file, set, shard, key, byte or JSON path.
        action: the next step for the user.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        found: str,
        *,
        expected: str | None = None,
        where: str | None = None,
        action: str | None = None,
    ) -> None:
        self.found = found
        self.expected = expected
        self.where = where
        self.action = action
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}" if self.where else self.found
        if self.expected:
            text += f"; expected {self.expected}"
        if self.action:
            text += f"\n  → {self.action}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the four parts when the error crosses a process boundary."""
        return _rebuild, (type(self), self.found, self.expected, self.where, self.action)


class ConfigError(DistillError):
    """The configuration, the command line or a place named in it is wrong."""

    exit_code = 2


class CorruptError(DistillError):
    """Bytes on disk are damaged, cut short or not in the declared format."""

    exit_code = 3


class IncompatibleError(DistillError):
    """Two valid things do not belong together: sets, checkpoints, configurations."""

    exit_code = 4


class StorageError(DistillError):
    """A file system or store refused: full, read-only, gone, replaced while reading."""

    exit_code = 5


class NumericalError(DistillError):
    """A model or a loss produced NaN or infinity, or ranks differ; nothing of it was committed."""

    exit_code = 6


class Preempted(DistillError):  # noqa: N818 - the usual term; it is not a fault
    """The process was asked to stop and has saved its state; the same command resumes."""

    exit_code = 75


def _rebuild(
    kind: type[DistillError],
    found: str,
    expected: str | None,
    where: str | None,
    action: str | None,
) -> DistillError:
    return kind(found, expected=expected, where=where, action=action)
