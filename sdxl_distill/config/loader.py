"""From a file and `--set` overrides to a checked configuration, or all its faults at once.

Paths inside a configuration are relative to the current folder, not to the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from sdxl_distill.config.json5_text import read_json5
from sdxl_distill.config.override import Override
from sdxl_distill.config.problem import Problem, problems
from sdxl_distill.config.section import Section
from sdxl_distill.errors import ConfigError
from sdxl_distill.limits import MAX_CONFIG_BYTES

Schema = TypeVar("Schema", bound=Section)


def load_config(path: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read a configuration, lay the overrides over it and check it.

    Args:
        path: JSON file; comments and trailing commas are allowed, and a `$schema` key for editors.
        schema: `BuilderConfig` or `DistillConfig`.
        overrides: `a.b.c=value` each, later ones win; the value is JSON, or text if it is not.

    Raises:
        ConfigError: file, JSON path, what was found and what belongs there, for every fault.
        StorageError: when the file cannot be read.
    """
    # The file's tree, with the overrides laid over it.
    tree = read_json5(Path(path))
    if isinstance(tree, dict):
        cast("dict[str, Any]", tree).pop("$schema", None)
    given = [Override.parse(argument) for argument in overrides]
    places = {override.apply(tree, override.value): override for override in given}
    # Checked by the schema; every fault is reported where it came from.
    try:
        config = _validate(tree, schema, places)
    except ValidationError as error:
        raise _config_error(path, problems(error, schema), places) from error
    num_bytes = len(resolved_json(config).encode())
    if num_bytes > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"with all its defaults it has {num_bytes} bytes",
            expected=f"at most {MAX_CONFIG_BYTES}, since a run keeps it",
            where=str(path),
            action="shorten its lists",
        )
    return config


def resolved_json(config: Section) -> str:
    """Write a configuration with all its defaults as JSON; loading it gives an equal one."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def _validate(
    tree: Any, schema: type[Schema], places: dict[tuple[str | int, ...], Override]
) -> Schema:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        if not _take_as_text(tree, error, places):
            raise
    return schema.model_validate(tree)


def _take_as_text(
    tree: Any, error: ValidationError, places: dict[tuple[str | int, ...], Override]
) -> bool:
    """Put back the text of overrides like `cache.version=2`, meant as text but read as a number."""
    taken = False
    for details in error.errors(include_url=False):
        override = places.get(details["loc"])
        number = isinstance(details["input"], int | float)
        if details["type"] == "string_type" and override is not None and number:
            override.apply(tree, override.text)
            taken = True
    return taken


def _config_error(
    path: str | Path, found: list[Problem], places: dict[tuple[str | int, ...], Override]
) -> ConfigError:
    origins = [_origin(problem, places) or str(path) for problem in found]
    if len(found) == 1:
        [problem], [origin] = found, origins
        where = f"{origin}: {problem.place}"
        return ConfigError(
            problem.found, expected=problem.expected, where=where, action=problem.action
        )
    lines = [f"{origin}: {problem}" for origin, problem in zip(origins, found, strict=True)]
    return ConfigError("\n  ".join([f"{len(found)} problems", *lines]), where=str(path))


def _origin(problem: Problem, places: dict[tuple[str | int, ...], Override]) -> str | None:
    for place, override in places.items():
        if problem.location[: len(place)] == place:
            return override.option
    return None
