"""The topology of a launch as a value: who am I, out of how many, on which node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_distill.errors import ConfigError
from sdxl_distill.runtime.cores import available_cores


@dataclass(frozen=True)
class World:
    """One process among `size`; `local_rank` of `local_size` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size):
            raise ConfigError(
                f"rank {self.rank} of {self.size}, local rank {self.local_rank} "
                f"of {self.local_size}",
                expected="0 <= rank < size",
                where="launcher environment",
                action="start with `accelerate launch` or plain `python`",
            )

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for its launch: prints, scans, writes logs."""
        return self.rank == 0

    @property
    def num_cores(self) -> int:
        """This process's share of the cores that its node's processes may use, at least 1."""
        return max(1, available_cores() // self.local_size)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE as torchrun sets them.

        Raises:
            ConfigError: when one of them is not an integer or they contradict each other.
        """
        names = {"rank": "RANK", "size": "WORLD_SIZE"}
        names |= {"local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
        try:
            values = {
                field: int(environment[name])
                for field, name in names.items()
                if name in environment
            }
        except ValueError as error:
            raise ConfigError(
                f"a launcher variable is not an integer ({error})",
                where="launcher environment",
                action="unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or launch again",
            ) from error
        return cls(**values)
