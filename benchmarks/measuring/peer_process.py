"""A peer in its own environment and process, which reads an epoch when it is told to."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

_FOLDER: Final = Path(__file__).parents[1]
PEER_PYTHON: Final = _FOLDER / ".peers/bin/python"
PEER_SCRIPTS: Final = _FOLDER / "peers"
NEED_NOTHING_MORE: Final = frozenset(
    {"webdataset_zip", "loose_files", "loose_files_workers", "memory_map"}
)
"""Peers that the project's own environment can run; a small run tries no others."""


class PeerError(RuntimeError):
    """A peer could not be started, or died, or did not answer in time."""


def start_peers(
    names: Iterable[str], root: Path, *, small: bool
) -> Iterator[tuple[str, PeerProcess | PeerError]]:
    """Yield each peer when it has prepared its files, or why it could not.

    Args:
        names: of scripts.
        root: folder of the sets.
        small: install nothing, and leave out what would need it.
    """
    for name in names:
        try:
            if name not in NEED_NOTHING_MORE:
                install_peers(small=small)
            yield name, PeerProcess(name, root)
        except PeerError as error:
            yield name, error


def install_peers(*, small: bool) -> None:
    """Make the environment of the peers where it is missing.

    Raises:
        PeerError: saying why there is none.
    """
    if small:
        raise PeerError("left out of small runs")
    command = [sys.executable, PEER_SCRIPTS / "install.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"not installed: {_last_line(done.stderr)}")


class PeerProcess:
    """A script of peers/ that has prepared its files; use as a context.

    Args:
        name: of the script.
        root: folder of the sets.
        timeout_seconds: for each answer.

    Raises:
        PeerError: when it does not get so far.
    """

    def __init__(self, name: str, root: Path, timeout_seconds: float = 120) -> None:
        self._timeout_seconds = timeout_seconds
        self._log_path = root / f"{name}.log"
        self._log = self._log_path.open("w")
        python = sys.executable if name in NEED_NOTHING_MORE else PEER_PYTHON
        self._process = subprocess.Popen(
            [python, PEER_SCRIPTS / f"{name}.py", root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._answer()
        except PeerError:
            self.close()
            raise

    def epoch_seconds(self) -> float:
        """Return how long it took to read all records once."""
        return self._ask("epoch")["seconds"]

    def digests(self) -> dict[str, str]:
        """Return key → digest of what it read."""
        return self._ask("digests")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(f"died: {_last_line(self._log_path.read_text())}") from error
        return self._answer()

    def _answer(self) -> Any:
        output = self._process.stdout
        assert output is not None
        if not select.select([output], [], [], self._timeout_seconds)[0]:
            raise PeerError(f"no answer in {self._timeout_seconds:.0f} s")
        line = output.readline()
        if not line:
            raise PeerError(f"died: {_last_line(self._log_path.read_text())}")
        return json.loads(line)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1][:200]
