"""The generated reference is today's, and says something about every key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from sdxl_distill.config.problem import leaves, section_at
from sdxl_distill.config.reference import SCHEMAS, json_schema, markdown
from sdxl_distill.config.section import Section

ROOT = Path(__file__).parents[2]


def _field(schema: type[Section], path: tuple[str, ...]) -> FieldInfo:
    return section_at(schema, path[:-1]).model_fields[path[-1]]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_json_schema_is_todays(name):
    written = (ROOT / "configs" / f"{name}.schema.json").read_text("utf-8")
    assert written == json_schema(SCHEMAS[name]), "run `make docs`"


def test_the_configuration_page_is_todays():
    assert (ROOT / "docs/configuration.md").read_text("utf-8") == markdown(), "run `make docs`"


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_described(name):
    schema = SCHEMAS[name]
    assert [path for path in leaves(schema) if not _field(schema, path).description] == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_editors_refuse_unknown_keys_in_every_section(name):
    tree = json.loads(json_schema(SCHEMAS[name]))
    sections = [tree, *tree["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
