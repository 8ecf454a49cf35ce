"""Who builds what: claims on units of work, shared by any number of workers and launches.

A claim is the file `.build/claims/{unit}.{attempt}`, created create-only with its owner's
token; the highest attempt holds. Taking over means creating the next attempt. Claims save work
and never guard data: a wrong expiry costs a unit built twice, nothing else.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial

from sdxl_distill.builder.heartbeat import Heartbeat, Observer, Timing
from sdxl_distill.builder.in_place import require_in_place, until_not_swept
from sdxl_distill.errors import CorruptError
from sdxl_distill.runtime.world import World
from sdxl_distill.storage.fsio import TEMPORARY_PREFIX, Directory
from sdxl_distill.storage.regular_file import LostDirectoryError

BUILD_FOLDER = ".build"
INDEX_SUFFIX = ".idx"
_TOKEN_BYTES = 32
_TOKEN = re.compile("[0-9a-f]{32}")
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + "(?P<token>[0-9a-f]{32})-.*")
_CLAIM = re.compile(r"(?P<unit>.+)\.(?P<attempt>\d{1,9})")


@dataclass(frozen=True)
class Claim:
    """One attempt of one worker at one unit of work."""

    unit: str
    attempt: int = 0

    @property
    def name(self) -> str:
        """File name of the claim."""
        return f"{self.unit}.{self.attempt}"

    @property
    def taken_over(self) -> bool:
        """Whether another worker claimed the unit before."""
        return self.attempt > 0

    @classmethod
    def parse(cls, name: str) -> Claim | None:
        """Return the claim that a file name stands for; None for any other name."""
        match = _CLAIM.fullmatch(name)
        return match and cls(match["unit"], int(match["attempt"]))


class WorkQueue:
    """The claims on one shard set, seen by one worker.

    A unit is committed when its index exists. Claims may also be taken on other work of the
    set, such as the scan or the finish, by `claim` and `release`.

    Args:
        directory: the set, opened before it was looked at; its token is the worker's name.
        timing: the times of heartbeats, expiry and take-over.
        clock: the time in seconds, which never goes back; replaced in tests.

    Raises:
        StorageError: when the folder cannot be written, or cannot create a name at most once.
    """

    def __init__(
        self,
        directory: Directory,
        timing: Timing | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self.timing = timing or Timing()
        self._clock = clock
        with ExitStack() as opened:
            self._build = opened.enter_context(_opened(directory, BUILD_FOLDER))
            self._claims = opened.enter_context(_opened(self._build, "claims"))
            self._workers = opened.enter_context(_opened(self._build, "workers"))
            # First of all, so that every temporary file has an owner that can be looked up.
            self.heartbeat = opened.enter_context(Heartbeat(self._workers, self.timing))
            self._opened = opened.pop_all()
        self.observer = Observer(self._workers, self.timing, clock)
        self._lock = threading.Lock()
        self._own: dict[Claim, float] = {}
        self._durations: list[float] = []
        self._first_seen: dict[Claim, float] = {}
        self._changed = threading.Event()

    def is_committed(self, unit: str) -> bool:
        """Whether the index of a shard exists."""
        return self._directory.exists(f"{unit}{INDEX_SUFFIX}")

    def claim_units(
        self,
        units: Sequence[str],
        world: World,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Iterator[Claim]:
        """Yield a claim on one shard after the other until all are committed.

        The worker's own stride comes first, so that the workers of a launch seldom meet; then
        whatever is left or was held by dead workers; last, what has been held for too long. Waits
        while others hold the rest. Release each claim when its shard is committed.

        Args:
            units: the shards' names without suffix, the same list for every worker.
            world: this worker among those of its launch, which tells its own stride.
            stop_requested: the function that ends the walk, even a waiting one, by returning True.

        Raises:
            StorageError: when the set was withdrawn, or its folder cannot be written.
        """
        for claim in self._walk(units, world):
            if stop_requested():
                return  # what was just claimed is given back by `close`
            if claim is not None:
                yield claim
            else:
                self._changed.wait(self.timing.poll_seconds)
                self._changed.clear()

    def claim(self, unit: str) -> Claim | None:
        """Claim a unit that is free or whose holder is dead; None when a living worker has it."""
        return self._claim(unit, self._holders().get(unit))

    def release(self, claim: Claim, *, committed: bool) -> None:
        """Give a claim back; if its unit was committed, others are compared with its duration."""
        with self._lock:
            started = self._own.pop(claim)
            if committed:
                self._durations.append(self._clock() - started)
        self._claims.remove(claim.name)
        self._changed.set()

    def sweep_temporaries(self) -> None:
        """Remove temporary files of dead workers; those of the living, of any launch, stay."""
        own, is_dead = self._directory.token, cache(self.observer.is_dead)
        for folder in (self._directory, self._claims, self._workers):
            for name in until_not_swept(folder, folder.names):
                if match := _TEMPORARY.fullmatch(name):
                    token = match["token"]
                    if token != own and is_dead(token):
                        folder.remove(name)

    def sweep(self) -> None:
        """Remove everything that dead workers left, once every unit is committed.

        Not before: the highest attempt at a unit must not vanish while it counts, and a
        heartbeat tells others at once that the holder of a claim is dead.
        """
        self.sweep_temporaries()
        for claim in self._existing_claims():
            if claim not in self._own and self._is_abandoned(claim):
                self._claims.remove(claim.name)
        tokens = until_not_swept(self._workers, self._workers.names)
        for token in tokens - {self._directory.token}:
            if self.observer.is_dead(token):
                self._workers.remove(token)

    def close(self) -> None:
        """Give back every claim, then remove the heartbeat: nothing of this worker is left."""
        with self._opened:
            for claim in list(self._own):
                self.release(claim, committed=False)

    def __enter__(self) -> WorkQueue:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _walk(self, units: Sequence[str], world: World) -> Iterator[Claim | None]:
        """Yield claims, and None when there is nothing to claim at this moment."""
        yield from self._claim_each(units[world.rank :: world.size])
        start = len(units) * world.rank // world.size
        remaining = [*units[start:], *units[:start]]
        while remaining := self._uncommitted(remaining):
            claimed = False
            for claim in self._claim_each(remaining):
                claimed = True
                yield claim
            if not claimed:
                yield self._claim_straggler(remaining)

    def _uncommitted(self, units: Sequence[str]) -> list[str]:
        require_in_place(self._directory)
        names = self._directory.names()
        return [unit for unit in units if f"{unit}{INDEX_SUFFIX}" not in names]

    def _claim_each(self, candidates: Sequence[str]) -> Iterator[Claim]:
        holders = self._holders()
        for unit in candidates:
            if self.is_committed(unit):
                continue
            require_in_place(self._directory)
            claim = self._claim(unit, holders.get(unit))
            if claim is None:
                continue
            # Look again: its former holder may have committed it before letting go.
            if self.is_committed(unit):
                self.release(claim, committed=False)
                continue
            yield claim
            holders = self._holders()

    def _claim(self, unit: str, holder: Claim | None) -> Claim | None:
        with self._lock:
            if unit in {claim.unit for claim in self._own}:
                return None  # also when the claim itself was removed meanwhile
        if holder is None:
            return self._make(Claim(unit))
        self._first_seen.setdefault(holder, self._clock())
        if self._is_abandoned(holder):
            return self._make(Claim(unit, holder.attempt + 1))
        return None

    def _claim_straggler(self, remaining: Sequence[str]) -> Claim | None:
        """Take over the claim held longest, if too long: an idle worker loses nothing by trying."""
        with self._lock:
            if not self._durations:
                return None
            limit = self.timing.straggler_factor * statistics.median(self._durations)
        limit = max(limit, self.timing.heartbeat_seconds)
        holders = self._holders()
        held = [holders[unit] for unit in remaining if unit in holders]
        watched = {claim: self._first_seen[claim] for claim in held if claim in self._first_seen}
        if not watched:
            return None
        longest = min(watched, key=lambda claim: watched[claim])
        if self._clock() - watched[longest] <= limit:
            return None
        return self._make(Claim(longest.unit, longest.attempt + 1))

    def _make(self, claim: Claim) -> Claim | None:
        content = self._directory.token.encode("ascii")
        publish = partial(self._claims.publish_bytes, claim.name, content)
        if not until_not_swept(self._claims, publish):
            return None
        with self._lock:
            self._own[claim] = self._clock()
        return claim

    def _holders(self) -> dict[str, Claim]:
        """Return the highest attempt at each unit that is claimed."""
        holders: dict[str, Claim] = {}
        for claim in self._existing_claims():
            if claim.attempt >= holders.get(claim.unit, claim).attempt:
                holders[claim.unit] = claim
        return holders

    def _existing_claims(self) -> Iterator[Claim]:
        """Yield every existing claim."""
        for name in until_not_swept(self._claims, self._claims.names):
            if claim := Claim.parse(name):
                yield claim

    def _is_abandoned(self, claim: Claim) -> bool:
        """Whether the owner of a claim is dead, or its content is not a token."""
        try:
            content = self._claims.read(claim.name, _TOKEN_BYTES)
        except FileNotFoundError:
            return False
        except (CorruptError, LostDirectoryError):
            return True
        token = content.decode("ascii", errors="replace")
        return not _TOKEN.fullmatch(token) or self.observer.is_dead(token)


def _opened(parent: Directory, name: str) -> Directory:
    """Open a folder of the queue, which somebody may remove between its making and its opening."""
    return until_not_swept(parent, partial(parent.folder, name))
