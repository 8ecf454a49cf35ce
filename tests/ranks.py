"""The processes of one launch, forked from a server that has imported everything already.

They are what a launcher starts: real processes with its environment variables. A start takes a
second, where one through the launcher takes ten.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["sdxl_distill.train.session", "sdxl_distill.export.student", "torch.utils.tensorboard"]
)
DEADLINE_SECONDS = 120.0


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
            _CONTEXT.Process(
                target=_train,
                args=(
                    environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    [*argv, *own[rank]],
                    self.log,
                ),
            )
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def wait(self) -> list[int | None]:
        """Wait for all and return their exit codes."""
        for process in self._processes:
            process.join(DEADLINE_SECONDS)
        return [process.exitcode for process in self._processes]

    def kill(self) -> None:
        """End all at once by SIGKILL."""
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all ranks or some."""
        for process in (
            self._processes if ranks is None else map(self._processes.__getitem__, ranks)
        ):
            if process.is_alive():
                os.kill(process.pid or 0, number)

    @property
    def alive(self) -> bool:
        """Whether any of them runs."""
        return any(process.is_alive() for process in self._processes)


def wait_until(condition: Callable[[], object], ranks: Ranks | None = None) -> None:
    """Wait for a condition; fail when it takes too long or the ranks end before it holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        ended = ranks is not None and not ranks.alive and not condition()
        assert not ended, ranks and ranks.log.read_text()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _train(environment: dict[str, str], argv: list[str], log: Path) -> None:
    import torch

    from sdxl_distill.cli.main import run_command

    torch.set_num_threads(1)
    os.environ |= environment
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run_command("train", argv))
