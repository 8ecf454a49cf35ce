"""The processes of one launch of the trainer.

They are what a launcher starts: real processes with its environment variables. A start takes a
second, where one through the launcher takes ten.
"""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from support import patience
from support.forked_command import ForkedCommand

# Below the ports that an operating system gives to whoever asks for any: none of those who
# connect somewhere takes one between the look here and the launch.
_PORTS = range(15_000, 32_000)


class Ranks:
    """One launch of `train`; its output is in `log`.

    Args:
        world: how many ranks.
        config: of all of them.
        arguments: of the command.
        own_arguments: of each rank; a real launcher gives all ranks the same.
    """

    def __init__(
        self,
        world: int,
        config: Path,
        *arguments: str,
        own_arguments: Sequence[Sequence[str]] = (),
    ) -> None:
        self.log = config.with_suffix(".log")
        self.log.touch()
        argv = ["--config", str(config), "--no-export", *arguments]
        own = own_arguments or [()] * world
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        self._processes = [
            ForkedCommand(
                "train",
                *argv,
                *own[rank],
                output=self.log,
                environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]

    def wait(self) -> list[int | None]:
        """Wait for all and return their exit codes; None for one that does not end."""
        for process in self._processes:
            process.join(patience.PATIENCE_SECONDS)
        return [process.exit_code for process in self._processes]

    def kill(self) -> None:
        """End all at once by SIGKILL."""
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all ranks or some."""
        for rank, process in enumerate(self._processes):
            if process.is_running and (ranks is None or rank in ranks):
                process.send(number)

    @property
    def alive(self) -> bool:
        """Whether any of them runs."""
        return any(process.is_running for process in self._processes)


def wait_until(condition: Callable[[], object], ranks: Ranks | None = None) -> None:
    """Wait for a condition; fail when it takes too long or the ranks end before it holds."""

    def holds() -> bool:
        alive = ranks is None or ranks.alive
        held = bool(condition())
        assert held or alive, ranks and ranks.log.read_text()
        return held

    patience.wait_until(holds)


def free_port() -> int:
    """Return a port that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
