"""A checkpoint that is written while the run goes on: a copy in main memory, and a thread.

Writing and hashing SDXL's 20 GB takes a minute, copying them from a GPU seconds. Only the copy
holds the steps up; the thread writes it under the same protocol as ever, so that a kill at any
moment leaves the checkpoint before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

import torch

from sdxl_distill.runtime.free_memory import free_memory

_SPARE = 1.05
"""How much more main memory than the copy must be free: others take some meanwhile."""

_log = logging.getLogger(__name__)


class Snapshot:
    """Copies of tensors in main memory, which is kept from one save to the next."""

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        self._has_warned = False

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether main memory has room for copies; warns once when it has not.

        Args:
            tensors: the tensors by name; they may be on "meta".
        """
        needed = sum(each.nbytes for name, each in tensors.items() if name not in self._copies)
        free = free_memory()
        if free is None or needed * _SPARE <= free:
            return True
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "main memory has %.1f GB free, and a copy of what a checkpoint holds takes %.1f GB "
                "more: the run waits while checkpoints are written",
                free / 1e9,
                needed / 1e9,
            )
        return False

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a tensor, which stays as it is until it is taken again."""
        tensor = tensor.detach()
        copy = self._copies.get(name)
        if copy is None:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._copies[name] = copy
        return copy.copy_(tensor)


class BackgroundSave:
    """Writes one checkpoint at a time.

    The thread ends with the process: whoever insists on ending at once loses what is half-written,
    as by a kill.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in a thread, after the one before has ended. Raises as `finish`."""
        self.finish()
        self._thread = threading.Thread(target=self._run, args=(write,), name="save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what a write that has ended met; costs nothing."""
        if self._error is not None:
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written; raises, once, what the write met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised in the run's own thread
            self._error = error
