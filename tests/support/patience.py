"""How long tests wait for what must come: far longer than it takes, for the machine may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PATIENCE_SECONDS: Final = 240.0


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition; one that raises ends the waiting."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)
