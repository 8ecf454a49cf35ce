"""One trainer at a time in the folder of a run: a lock that names its holder.

The file `lock-{attempt:06d}.json` is published create-only, and its holder rewrites it every 15 s.
A holder that died on this host is noticed at once, one elsewhere when its file has not changed for
120 s on the observer's own clock; the next trainer then publishes the next attempt.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from sdxl_distill.errors import ConfigError, CorruptError, StorageError
from sdxl_distill.runtime.process_identity import BEAT_SECONDS, EXPIRY_SECONDS, ProcessIdentity
from sdxl_distill.storage.fsio import Directory

_NAME: Final = re.compile(r"lock-([0-9]{6})\.json")
_MAX_BYTES: Final = 4096


@dataclass(frozen=True)
class LockTiming:
    """How often a holder shows that it lives, and when others take it for dead."""

    beat_seconds: float = BEAT_SECONDS
    """Time between two beats of the holder."""
    expiry_seconds: float = EXPIRY_SECONDS
    """Time after which an unchanged lock of another host has no holder any more."""
    poll_seconds: float = 0.5
    """Time between two looks at the lock of another host."""


@dataclass(frozen=True)
class Holder:
    """The lock's holder as its file describes it: process, host, start time and a counter."""

    identity: ProcessIdentity
    host: str
    since: str
    num_beats: int = 0

    @classmethod
    def current(cls) -> Holder:
        """Return this process as a holder."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(ProcessIdentity.current(), socket.gethostname(), now)

    def to_bytes(self) -> bytes:
        """Encode as JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Holder | None:
        """Decode; None when the content describes no holder."""
        try:
            fields: dict[str, Any] = json.loads(content)
            return cls(ProcessIdentity(**fields.pop("identity")), **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


class RunLock:
    """Holds a run's folder within its block.

    Args:
        path: the run's folder, which is made.
        timing: the lock's timing; None is the usual one.

    Raises:
        ConfigError: on entry, when another process trains there.
        StorageError: when the disk refuses.
    """

    def __init__(self, path: Path, timing: LockTiming | None = None) -> None:
        self._path = path
        self._timing = timing or LockTiming()
        self._holder = Holder.current()
        self._name = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        # Where files cannot be created exclusively, it only looks first: better than no training.
        self._folder = Directory(self._path, create=True, exclusive=True)
        try:
            while not self._try_once():
                pass
        except BaseException:
            self._folder.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._closed.set()
        self._thread.join()
        with suppress(StorageError):  # the folder may be gone, and the lock with it
            self._folder.remove(self._name)
        self._folder.close()

    def require_held(self) -> None:
        """Check that no other process took this one for dead, as when it or its host was suspended.

        Raises:
            StorageError: when one did: what this run would write is no longer wanted.
        """
        if self._attempts()[-1:] != [self._name]:
            raise StorageError(
                "another process has taken over this run while this one was suspended",
                expected=f"{self._name}, the lock of this process",
                where=str(self._path),
                action="leave the run to the other process; nothing more is written by this one",
            )

    def _try_once(self) -> bool:
        """Take the lock; False when another process was faster: look again."""
        before = {name: self._require_dead(name) for name in self._attempts()}
        number = 1 + max((int(name[5:11]) for name in before), default=0)
        self._name = f"lock-{number:06d}.json"
        if not self._folder.publish_bytes(self._name, self._holder.to_bytes()):
            return False
        # Other runs may have come and gone since that look, so that a third one now holds a lower
        # name, perhaps that of a dead lock.
        for name in self._attempts():
            if name != self._name and self._read(name) not in (None, before.get(name)):
                self._folder.remove(self._name)
                return False
        for name in before:
            self._folder.remove(name)
        return True

    def _attempts(self) -> list[str]:
        return sorted(filter(_NAME.fullmatch, self._folder.names()))

    def _require_dead(self, name: str) -> bytes | None:
        """Return the content of a lock without a living holder; None when the file is gone."""
        content = self._read(name)
        seen_at = time.monotonic()
        holder = None if content is None else Holder.from_bytes(content)
        while content is not None:
            own = self._holder.identity
            if holder is not None and holder.identity.is_gone(own):
                break
            is_here = holder is not None and holder.identity.is_neighbour(own)
            if is_here or self._read(name) not in (content, None):
                raise self._held(name, holder)
            if time.monotonic() - seen_at > self._timing.expiry_seconds:
                break
            time.sleep(self._timing.poll_seconds)
            content = None if self._read(name) is None else content
        return content

    def _read(self, name: str) -> bytes | None:
        try:
            return self._folder.read(name, _MAX_BYTES)
        except FileNotFoundError:
            return None
        except CorruptError:
            return b""

    def _held(self, name: str, holder: Holder | None) -> ConfigError:
        found = "another process is training this run"
        if holder is not None:
            found = (
                f"process {holder.identity.pid} on host {holder.host} has been training this run "
                f"since {holder.since}"
            )
        return ConfigError(
            found,
            expected="one trainer at a time in a run's folder",
            where=str(self._path / name),
            action="wait until it has ended, or choose another run.name; a process that was killed "
            f"is noticed, on another host after {self._timing.expiry_seconds:.0f} s",
        )

    def _keep_beating(self) -> None:
        while not self._closed.wait(self._timing.beat_seconds):
            self._holder = replace(self._holder, num_beats=self._holder.num_beats + 1)
            # A disk that refuses this refuses the checkpoint too, and that error is shown.
            with suppress(StorageError):
                if self._attempts()[-1:] == [self._name]:
                    self._folder.replace_bytes(self._name, self._holder.to_bytes())
