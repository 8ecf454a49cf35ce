"""What a checkpoint says besides its tensors: where the run was, and what made it that run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sdxl_distill.errors import CorruptError


@dataclass(frozen=True)
class Position:
    """Where a run is: `global_step` steps are done, the next one is `step` of `epoch`."""

    global_step: int = 0
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class RunState:
    """The JSON part of a checkpoint.

    Attributes:
        position: the run's position.
        identity: configuration, student, noise schedule and sets that determine its steps.
        stream: identity of the stream order.
        optimizer: settings that give its state tensors their meaning.
    """

    position: Position
    identity: dict[str, Any]
    stream: dict[str, Any]
    optimizer: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> RunState:
        """Build from what `to_json` returned.

        Args:
            fields: the fields of a checkpoint, which may come from a stranger.
            where: the checkpoint.

        Raises:
            CorruptError: when a field is missing or of another type.
        """
        try:
            numbers = {name: fields["position"][name] for name in Position.__dataclass_fields__}
            mappings = {name: fields[name] for name in ("identity", "stream", "optimizer")}
        except (KeyError, TypeError) as error:
            raise _foreign(f"no field {error}", where) from error
        for name, number in numbers.items():
            if type(number) is not int or number < 0:
                raise _foreign(f"position.{name} is {number!r}", where)
        for name, mapping in mappings.items():
            if not isinstance(mapping, dict):
                raise _foreign(f"{name} is {mapping!r}", where)
        return cls(Position(**numbers), **mappings)


def _foreign(found: str, where: str) -> CorruptError:
    return CorruptError(
        found,
        expected="the state of a training run",
        where=where,
        action="resume with a checkpoint that train has written",
    )
