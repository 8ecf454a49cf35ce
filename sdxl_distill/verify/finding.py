"""A finding of the verifier: a typed error that was written down instead of raised.

Every finding says set, shard, key, what is wrong and what to do. A shard with thousands of faults
gives a few findings and a count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from sdxl_distill.errors import (
    ConfigError,
    CorruptError,
    DistillError,
    IncompatibleError,
    NumericalError,
    StorageError,
)

MAX_PER_SHARD: Final = 5
_WORST_FIRST: Final[tuple[type[DistillError], ...]] = (
    CorruptError,
    IncompatibleError,
    NumericalError,
    StorageError,
    ConfigError,
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        error: what is wrong and what to do; its branch decides the exit code.
        set_id: the set's name; the folder's where there is none.
        shard: the file name of the shard, or of another faulty file; None for the set itself.
        key: the record's key; None for the whole shard.
    """

    error: DistillError
    set_id: str
    shard: str | None = None
    key: str | None = None

    def __str__(self) -> str:
        place = f"set {self.set_id}"
        if self.shard is not None:
            place += f", {self.shard}"
        elif self.error.where:
            place += f", {self.error.where}"
        if self.key is not None:
            place += f", key {self.key}"
        text = f"{type(self.error).__name__}: {place}: {self.error.found}"
        if self.error.expected:
            text += f"; expected {self.error.expected}"
        if self.error.action:
            text += f"\n  → {self.error.action}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "error": type(self.error).__name__,
            "exit_code": self.error.exit_code,
            "set": self.set_id,
            "shard": self.shard,
            "key": self.key,
            "where": self.error.where,
            "found": self.error.found,
            "expected": self.error.expected,
            "action": self.error.action,
        }


class FindingList:
    """The findings of one shard, or of one file: the first few, and a count of the others.

    Args:
        set_id: the set's name.
        shard: the file name that the findings are about; None for the set itself.
        limit: the number of findings that are kept.
    """

    def __init__(
        self, set_id: str, shard: str | None = None, *, limit: int = MAX_PER_SHARD
    ) -> None:
        self._set_id = set_id
        self._shard = shard
        self._limit = limit
        self._shown: list[Finding] = []
        self._untold: list[DistillError] = []

    def __len__(self) -> int:
        return len(self._shown) + len(self._untold)

    def add(self, error: DistillError, key: str | None = None) -> None:
        """Add one more."""
        if len(self._shown) < self._limit:
            self._shown.append(Finding(error, self._set_id, self._shard, key))
        else:
            self._untold.append(error)

    def collecting(self, key: str | None = None) -> Collecting:
        """Return a context that writes down the error of ours that ends its block."""
        return Collecting(self, key)

    def all(self) -> list[Finding]:
        """Return the findings, the last of which may be a count."""
        if not self._untold:
            return list(self._shown)
        worst = worst_branch(self._untold)
        rest = worst(
            f"{len(self._untold)} more findings",
            action="look at the first ones: what repairs those repairs these",
        )
        return [*self._shown, Finding(rest, self._set_id, self._shard)]


class Collecting:
    """Ends its block at the first error of ours; what follows the block still runs.

    Args:
        findings: the list that the error is added to.
        key: the key of the record that the block is about.
    """

    def __init__(self, findings: FindingList, key: str | None) -> None:
        self._findings = findings
        self._key = key

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, DistillError):
            self._findings.add(error, self._key)
            return True
        return False


def worst_branch(errors: Iterable[DistillError]) -> type[DistillError]:
    """Return the worst branch of the exception tree that at least one error belongs to."""
    found = {type(error) for error in errors}
    return next(
        branch for branch in _WORST_FIRST if any(issubclass(kind, branch) for kind in found)
    )


def exit_code_of(findings: Iterable[Finding]) -> int:
    """Return the exit code of the worst finding; 0 when there is none."""
    errors = [finding.error for finding in findings]
    return worst_branch(errors).exit_code if errors else 0
