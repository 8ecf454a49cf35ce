"""Values given on the command line: `--set a.b.c=value`, laid over the file's tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sdxl_distill.config.json5_text import json_path, parse_json5
from sdxl_distill.errors import ConfigError


@dataclass(frozen=True)
class Override:
    """One `--set`.

    Attributes:
        parts: the path, cut at its dots; `teachers.0.weight` and `teachers[0].weight` are equal.
        text: the part after the first equals sign.
    """

    parts: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, argument: str) -> Override:
        """Cut `a.b.c=value` into path and value.

        Raises:
            ConfigError: when there is no equals sign or a part of the path is empty.
        """
        path, equals, text = argument.partition("=")
        parts = tuple(re.sub(r"\[(\d+)\]", r".\1", path.strip()).split("."))
        if not equals or not all(parts):
            raise ConfigError(
                f'"{argument}"',
                expected="a path, an equals sign and a value",
                where="--set",
                action="write it as --set training.lr=1e-5",
            )
        return cls(parts, text)

    @property
    def option(self) -> str:
        """The override as it was given."""
        return f"--set {'.'.join(self.parts)}={self.text}"

    @property
    def value(self) -> Any:
        """The text parsed as JSON5, or as it is if it is not JSON5."""
        try:
            value, twins = parse_json5(self.text)
        except ValueError:
            return self.text
        if twins:
            raise ConfigError(
                f"{', '.join(twins)} is given more than once",
                expected="every key once",
                where=self.option,
            )
        return value

    def apply(self, tree: Any, value: Any) -> tuple[str | int, ...]:
        """Put `value` at the path into `tree`, creating missing objects on the way.

        Returns:
            The place, list positions as integers.

        Raises:
            ConfigError: when the path runs through a scalar or beyond the end of a list.
        """
        location: tuple[str | int, ...] = ()
        node = tree
        for part in self.parts[:-1]:
            key = self._key(node, part, location)
            location += (key,)
            if isinstance(key, str) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        key = self._key(node, self.parts[-1], location)
        node[key] = value
        return (*location, key)

    def _key(self, node: Any, part: str, location: Sequence[str | int]) -> str | int:
        if isinstance(node, dict):
            return part
        place = json_path(location) or "the file"
        if not isinstance(node, list):
            raise ConfigError(
                f"{place} is not an object", expected="an object or a list", where=self.option
            )
        length = len(cast("list[Any]", node))
        if not part.isdecimal() or int(part) >= length:
            raise ConfigError(
                f'"{part}" is not a position in {place}',
                expected=f"a number below {length}",
                where=self.option,
            )
        return int(part)
