"""What is wrong with a configuration, key by key, in words that help to mend it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sdxl_distill.config.json5_text import json_path
from sdxl_distill.config.section import BrokenRule, Section

_MAX_SHOWN = 80
_EXPECTED = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "an integer",
    "model_type": "an object, {…}",
    "string_type": "text in quotes",
    "string_unicode": "text of whole Unicode characters, also in paths",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list, […]",
}


@dataclass(frozen=True)
class Problem:
    """One fault at one place of a configuration; the texts are those of `DistillError`."""

    location: tuple[str | int, ...]
    found: str
    expected: str
    action: str | None = None

    @property
    def place(self) -> str:
        """The JSON path, or "the whole file"."""
        return json_path(self.location) or "the whole file"

    def __str__(self) -> str:
        text = f"{self.place}: {self.found}; expected {self.expected}"
        return f"{text} → {self.action}" if self.action else text


def problems(error: ValidationError, schema: type[Section]) -> list[Problem]:
    """Translate every finding of the validation, in the order of the schema."""
    return [_problem(details, schema) for details in error.errors(include_url=False)]


def _problem(details: ErrorDetails, schema: type[Section]) -> Problem:
    location = details["loc"]
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(location, schema)
        case "missing":
            return Problem(location, "is missing", _meaning(location, schema))
        case "value_error":
            rule: Exception = details["ctx"]["error"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
            assert isinstance(rule, BrokenRule), rule
            return Problem((*location, *rule.key), rule.found, rule.expected, rule.action)
        case "too_short" | "too_long":
            expected = details["msg"].partition("should have ")[2].partition(" after")[0]
            return Problem(location, _shown(details["input"]), expected)
        case kind:
            message = details["msg"].removeprefix("Input should be ")
            expected = _EXPECTED.get(kind, message[0].lower() + message[1:])
            return Problem(location, _shown(details["input"]), expected)


def _shown(value: Any) -> str:
    """Write a value as JSON, cut to a line's length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _unknown_key(location: tuple[str | int, ...], schema: type[Section]) -> Problem:
    parent, key = location[:-1], str(location[-1])
    siblings = section_at(schema, parent).model_fields
    spellings = {_spelling(name): name for name in siblings}
    for match in difflib.get_close_matches(_spelling(key), spellings, n=1):
        nearest = json_path((*parent, spellings[match]))
        return Problem(location, "unknown key", f'"{nearest}"', f'rename it to "{nearest}"')
    for place in leaves(schema):
        if _spelling(place[-1]) == _spelling(key):
            nearest = ".".join(place)
            return Problem(location, "unknown key", f'"{nearest}"', f'move it to "{nearest}"')
    return Problem(location, "unknown key", f"one of {', '.join(siblings)}")


def _spelling(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _meaning(location: tuple[str | int, ...], schema: type[Section]) -> str:
    name = location[-1]
    if isinstance(name, int):
        return "as many numbers as the list needs"
    fields = section_at(schema, location[:-1]).model_fields
    field = fields[name]
    section = section_in(field.annotation)
    text = field.description or (section and section.__doc__) or name
    return text[0].lower() + text[1:].removesuffix(".")


def section_at(schema: type[Section], location: Sequence[str | int]) -> type[Section]:
    """Return the class of the section at a place in a configuration."""
    for part in location:
        if isinstance(part, str):
            section = section_in(schema.model_fields[part].annotation)
            assert section is not None, part
            schema = section
    return schema


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section class in a field's annotation, None when it is a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def leaves(schema: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key that holds a plain value; list positions are left out."""
    for name, field in schema.model_fields.items():
        section = section_in(field.annotation)
        if section is None:
            yield (*prefix, name)
        else:
            yield from leaves(section, (*prefix, name))
