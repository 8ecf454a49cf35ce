"""Rows: what a benchmark found, one number each, with the target and the spread of the rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from measuring.rounds import Sample

Condition: TypeAlias = str | int


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        metric: what was measured.
        value: median of the rounds; None where it could not be measured, and `against` says why.
        unit: of the value; `×` is a ratio.
        target: to reach; None where the number only informs.
        better: whether higher or lower is.
        against: what it was measured against, in the same rounds.
        spread: lowest and highest of the rounds.
        conditions: under which it was measured: column of the table → its value.
    """

    metric: str
    value: float | None
    unit: str
    target: float | None
    better: Literal["higher", "lower"]
    against: str
    spread: tuple[float, float] | None
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        metric: str,
        sample: Sample,
        unit: str,
        *,
        better: Literal["higher", "lower"] = "higher",
        target: float | None = None,
        against: str = "",
        conditions: Mapping[str, Condition] | None = None,
    ) -> Row:
        """Make a row of the median and the extremes of several rounds."""
        median, spread = sample.median, sample.spread
        return cls(metric, median, unit, target, better, against, spread, conditions or {})

    @classmethod
    def missing(
        cls,
        metric: str,
        unit: str,
        reason: str,
        conditions: Mapping[str, Condition] | None = None,
    ) -> Row:
        """Make a row of what could not be measured here, and why."""
        return cls(metric, None, unit, None, "higher", reason, None, conditions or {})

    @property
    def label(self) -> str:
        """The metric with its conditions, for text outside a table."""
        where = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        return f"{self.metric} ({where})" if where else self.metric

    @property
    def meets_target(self) -> bool | None:
        """Whether the value reaches the target; None without one of the two."""
        if self.target is None or self.value is None:
            return None
        if self.better == "higher":
            return self.value >= self.target
        return self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        """Return the row as it stands in results/latest.json."""
        return asdict(self)


@dataclass(frozen=True)
class Curve:
    """Points of one figure: one line for each name.

    Attributes:
        figure: title of the figure, which may show several curves.
        x_label, y_label: of the axes.
        lines: name → (x, y) points.
        is_log: whether both axes are logarithmic.
    """

    figure: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    is_log: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the curve as it stands in results/latest.json."""
        return asdict(self)


def table(rows: Iterable[Row]) -> str:
    """Return rows as a Markdown table, with a column for each condition that some row has."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row.conditions))
    head = [*names, "metric", "value", "spread", "target", "against"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(names)}---|---:|---:|---:|---|"]
    for row in rows:
        conditions = [str(row.conditions.get(name, "")) for name in names]
        spread = "" if row.spread is None else " … ".join(map(spell, row.spread))
        value = "not measured" if row.value is None else f"{spell(row.value)} {row.unit}"
        cells = [*conditions, row.metric, value, spread, _target(row), row.against]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spell(value: float) -> str:
    """Return a number with three significant digits, and no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" if abs(value) >= 0.001 else f"{value:.2g}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    sign = "≥" if row.better == "higher" else "≤"
    met = {True: "met", False: "**missed**", None: ""}[row.meets_target]
    return f"{sign} {spell(row.target)} {met}".rstrip()
