"""Commands as processes of their own that need not import torch first: forks of one server.

What `tools/*.py` do after their imports, in a process that can be killed at any moment.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from support.patience import PATIENCE_SECONDS

_CAP_DAC_OVERRIDE = 1
_PRELOADED = (
    "pytest",
    "diffusers.models.autoencoders.autoencoder_kl",  # the package imports them when they are used
    "diffusers.models.unets.unet_2d_condition",
    "sdxl_distill.sets.latents_set",
    "sdxl_distill.sets.predictions_set",
    "sdxl_distill.cli.build_latents",
    "sdxl_distill.cli.build_shards",
    "sdxl_distill.cli.build_summary",
    "sdxl_distill.export.student",
    "sdxl_distill.train.session",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
)
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(list(_PRELOADED))  # one list per test run: it is global


class ForkedCommand:
    """One process that runs one command.

    Args:
        arguments: `build-shards`, `--config`, …
        output: file that receives stdout and stderr, after what it holds.
        environment: added to the process's own.
        limits: called in the process before the command.
    """

    def __init__(
        self,
        *arguments: str,
        output: Path,
        environment: Mapping[str, str] | None = None,
        limits: Callable[[], None] | None = None,
    ) -> None:
        self._output = output
        self._process = FORK_SERVER.Process(
            target=_run, args=(arguments, str(output), dict(environment or {}), limits)
        )
        self._process.start()

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._output.read_text("utf-8")

    def send(self, signal_number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal_number)

    def join(self, seconds: float | None = None) -> None:
        """Wait until it ends, or for so long."""
        self._process.join(seconds)

    def kill_after(self, seconds: float) -> bool:
        """Kill it unless it ends before; True when it was killed."""
        self.join(seconds)
        if not self.is_running:
            return False
        self.send(signal.SIGKILL)
        self.join()
        return self.exit_code == -signal.SIGKILL

    def wait(self) -> int:
        """Return its exit code."""
        self.join(PATIENCE_SECONDS)
        assert self.exit_code is not None, f"still running: {self.output}"
        return self.exit_code


def _run(
    arguments: tuple[str, ...],
    output: str,
    environment: dict[str, str],
    limits: Callable[[], None] | None,
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    from sdxl_distill.cli.main import main

    if limits is not None:
        limits()
    sys.exit(main(arguments))


@contextmanager
def launched(
    num_processes: int,
    *arguments: str,
    output: Path,
    limits: Callable[[], None] | None = None,
) -> Iterator[list[ForkedCommand]]:
    """Start a command in processes that know each other as those of a launcher do.

    The store is here, as the launcher's is in the launcher: no process ends it for the others.
    """
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    commands = [
        ForkedCommand(
            *arguments,
            output=output.with_suffix(f".{rank}"),
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            limits=limits,
        )
        for rank in range(num_processes)
    ]
    try:
        yield commands
    finally:
        for command in commands:
            command.kill_after(0)


def obey_permissions() -> None:
    """Take from root its right to write where the permissions say no."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << _CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0


def limit_file_size() -> None:
    """Let the operating system refuse to make a file larger than 20,000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
