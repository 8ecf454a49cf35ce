"""The demo's real processes: the commands a user would type, run one after the other."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_distill.errors import DistillError
from sdxl_distill.runtime.cores import available_cores


@dataclass
class PhaseClock:
    """Seconds of each phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    _started: float = field(default_factory=time.perf_counter)

    def finish(self, phase: str) -> None:
        """Record the time since the last phase under this name."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._started
        self._started = now


def launch(
    arguments: Sequence[str], folder: Path, *, num_processes: int | None = None, port: int = 0
) -> None:
    """Run `sdxl-distill` with these arguments, through `accelerate launch` when asked.

    Args:
        arguments: the command and its options.
        folder: the working folder; paths in configurations are relative to it.
        num_processes: the number of processes, by the launcher; None runs plain Python.
        port: the port of the launcher's store; 0 lets it choose.

    Raises:
        DistillError: when it fails; its own message is on the terminal.
    """
    environment = dict(os.environ)
    command = [sys.executable, "-m", "sdxl_distill", *arguments]
    shown = ["sdxl-distill", *arguments]
    if num_processes is not None:
        launcher = [
            "--multi_gpu",  # accelerate's word for several processes; the variable makes them CPUs
            f"--num_processes={num_processes}",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            f"--main_process_port={port}",
            "-m",
            "sdxl_distill",
        ]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *arguments]
        shown = ["accelerate", "launch", f"--num_processes={num_processes}", "-m", "sdxl_distill",
                 *arguments]  # fmt: skip
        environment["ACCELERATE_USE_CPU"] = "true"
        # Two processes with all threads each would get in each other's way.
        threads = max(1, available_cores() // num_processes)
        environment["OMP_NUM_THREADS"] = str(threads)
    print(f"\n$ {shlex.join(shown)}", flush=True)
    status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    if status != 0:
        raise DistillError(
            f"`{arguments[0]}` ended with status {status}",
            where=str(folder),
            action="read its message above",
        )
