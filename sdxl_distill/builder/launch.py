"""What one launch has to agree on: rank 0 decides and tells the others.

Decisions go through the launcher's key-value store. No process group is made: an idle one
would time out while a rank caches for hours. A single process decides for itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cached_property
from os import environ
from typing import Any, TypeVar

import torch.distributed

from sdxl_distill import errors
from sdxl_distill.errors import ConfigError, DistillError, StorageError
from sdxl_distill.runtime.world import World

T = TypeVar("T")

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_ARRAY_TASKS = ("SLURM_ARRAY_TASK_ID", "PBS_ARRAY_INDEX", "SGE_TASK_ID", "LSB_JOBINDEX")


def _as_it_is(value: Any) -> Any:
    return value


class Launch:
    """The processes that were started together.

    Args:
        world: this process among them.
        environment: the variables of the process; replaced in tests.
        timeout: the longest wait for rank 0, which may scan millions of images.
        poll_seconds: the pause between two looks; a signal is noticed in between.
    """

    def __init__(
        self,
        world: World,
        environment: Mapping[str, str] = environ,
        *,
        timeout: timedelta = timedelta(days=3),
        poll_seconds: float = 0.2,
    ) -> None:
        self.world = world
        self._environment = environment
        self._timeout = timeout
        self._poll_seconds = poll_seconds

    @property
    def is_restart(self) -> bool:
        """Whether an elastic launcher started these processes again after a failure."""
        return self._environment.get(_RESTARTS, "0") != "0"

    @property
    def is_one_of_many(self) -> bool:
        """Whether this launch is one task of a job array: the tasks do not know each other."""
        if any(name in self._environment for name in _ARRAY_TASKS):
            return True
        without_launcher = "RANK" not in self._environment
        return without_launcher and self._environment.get("SLURM_NTASKS", "1") != "1"

    def decide(
        self,
        name: str,
        decision: Callable[[], T],
        *,
        encode: Callable[[T], Any] = _as_it_is,
        decode: Callable[[Any], T] = _as_it_is,
    ) -> T:
        """Return what rank 0 decided; only rank 0 calls `decision`, the others wait for it.

        Args:
            name: the decision's name; each is taken once per launch.
            decision: the function that takes it, on rank 0.
            encode: the function that turns it into a JSON value, which the other ranks are sent.
            decode: the function that turns that value back into the decision, on the other ranks.

        Raises:
            DistillError: on every rank, when rank 0's decision raised it.
            StorageError: when rank 0 does not answer in time, or the launcher is gone.
        """
        if self.world.size == 1:
            return decision()
        key = f"sdxl_distill/{name}"
        if not self.world.is_main:
            return decode(self._await(key))
        try:
            decided = decision()
        except DistillError as error:
            parts = [error.found, error.expected, error.where, error.action]
            branch = next(
                kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__
            )
            self._tell(key, {"error": branch.__name__, "parts": parts})
            raise
        self._tell(key, {"value": encode(decided)})
        return decided

    @cached_property
    def _store(self) -> torch.distributed.Store:
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=self._timeout))
        return store

    def _tell(self, key: str, answer: dict[str, Any]) -> None:
        try:
            self._store.set(key, json.dumps(answer))
        except (RuntimeError, ValueError) as error:
            raise _no_store(error) from error

    def _await(self, key: str) -> Any:
        deadline = time.monotonic() + self._timeout.total_seconds()
        try:
            # `get` alone would block in C++, deaf to SIGTERM.
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"no decision from rank 0 within {self._timeout}",
                        where=f"launch, {key}",
                        action="look at the log of rank 0, then launch again",
                    )
                time.sleep(self._poll_seconds)
            answer = json.loads(self._store.get(key))
        except (RuntimeError, ValueError) as error:
            raise _no_store(error) from error
        if "value" in answer:
            return answer["value"]
        found, expected, where, action = answer["parts"]
        kind: type[DistillError] = getattr(errors, answer["error"])
        raise kind(found, expected=expected, where=where, action=action)


def refuse_in_job_array(launch: Launch, where: str) -> None:
    """Refuse to replace or repair a set in a job array: its tasks would undo each other's work.

    Raises:
        ConfigError: in a job array.
    """
    if launch.is_one_of_many:
        raise ConfigError(
            "the tasks of a job array cannot agree which of them replaces or repairs a set",
            expected="one launch that does so before the array starts",
            where=where,
            action="run the builder once with --withdraw-only (build_latents: --rebuild) or "
            "--repair, then submit the array without that option",
        )


def require_one_worker(world: World, exclusive: bool, where: str) -> None:
    """Hold a launch to the promise that `cache.exclusive` makes.

    Raises:
        ConfigError: when it has several workers.
    """
    if exclusive and world.size > 1:
        raise ConfigError(
            f"cache.exclusive promises a single worker, and this launch has {world.size}",
            expected="one process",
            where=where,
            action="start one process, or remove the key if the file system has hard links",
        )


def _no_store(error: Exception) -> StorageError:
    return StorageError(
        f"the launcher's key-value store does not answer ({str(error).partition(chr(10))[0]})",
        where="launch",
        action="look at the log of the launcher and of rank 0, then launch again",
    )
