"""The reference generated from the schema: JSON Schemas for editors and docs/configuration.md.

`python -m sdxl_distill.config.reference` writes them into the repository that it is started in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig
from sdxl_distill.config.problem import section_in
from sdxl_distill.config.section import Section

SCHEMAS: dict[str, type[Section]] = {"builder": BuilderConfig, "distill": DistillConfig}

_INTRODUCTION = """\
# Configuration

<!-- Generated from sdxl_distill/config by `make docs`; a test compares them. -->

Two files configure everything: one for the builders (`build_latents`, `build_shards`), written once
per teacher, and one for the trainer (`train`, `export_student`). Examples:
[configs/cache_builder.example.json](../configs/cache_builder.example.json) and
[configs/distill.example.json](../configs/distill.example.json).

- Files are JSON in which `//` and `/* */` comments and trailing commas are allowed.
- Relative paths are relative to the folder that the command is started in, not to the file.
- `--set a.b.c=value` on every command overrides one key; the value is JSON, or text if it is
  not: `--set training.lr=1e-5 --set teachers.0.weight=0.5 --set student.text_encoder_id=null`.
- `--rehash` reads checkpoints that seem unchanged again, instead of trusting the fingerprints that
  earlier commands remembered in `~/.cache/sdxl_distill` (below `XDG_CACHE_HOME` where that is set).
- `--print-config` shows the resolved configuration: the file, the overrides and every default. It
  can be saved and loaded again.
- An unknown key, a wrong type or a missing value stops the command before any work, with the file,
  the path of the key, what was found and the nearest legal key; all faults are listed at once.
- Editors complete and check keys with the JSON Schemas next to the examples: begin a file with
  `"$schema": "./builder.schema.json"` or `"$schema": "./distill.schema.json"`.
"""


def json_schema(schema: type[Section]) -> str:
    """Return the JSON Schema of a configuration file, with the `$schema` key that editors use."""
    tree = schema.model_json_schema()
    tree["properties"]["$schema"] = {"type": "string", "description": "Path of this schema."}
    tree = {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def markdown() -> str:
    """Return docs/configuration.md: every key with its type, default and meaning."""
    pages = [_INTRODUCTION]
    for title, schema in zip(
        ("The builders' file", "The trainer's file"), SCHEMAS.values(), strict=True
    ):
        pages.append(f"## {title}\n")
        pages += [_table(path, section) for path, section in _sections(schema, "")]
    return "\n".join(pages)


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        child = section_in(annotation)
        if child is not None:
            suffix = "" if child is annotation else "[]"
            yield from _sections(child, f"{path}.{name}{suffix}".removeprefix("."))


def _table(path: str, section: type[Section]) -> str:
    properties = section.model_json_schema()["properties"]
    heading = f"### `{path}`\n\n" if path else ""
    lines = [
        f"{heading}{section.__doc__}\n",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        child = section_in(annotation)
        if child is not None and child is annotation:
            continue
        kind = "list of objects" if child else _type_text(properties[name])
        required = field.default is PydanticUndefined
        default = "required" if required else f"`{json.dumps(properties[name]['default'])}`"
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type_text(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_type_text(choice) for choice in node["anyOf"])
    if "enum" in node:
        return ", ".join(f"`{json.dumps(value)}`" for value in node["enum"])
    if "prefixItems" in node:
        items = node["prefixItems"]
        return f"{len(items)} × ({_type_text(items[0])})"
    if node["type"] == "array":
        return f"list of {_type_text(node['items'])}"
    if "const" in node:
        return f"`{json.dumps(node['const'])}`"
    return ", ".join([node["type"], *_limits(node)])


def _limits(node: dict[str, Any]) -> Iterator[str]:
    words = {
        "exclusiveMinimum": ">",
        "minimum": "≥",
        "exclusiveMaximum": "<",
        "maximum": "≤",
        "multipleOf": "multiple of",
    }
    for keyword, word in words.items():
        if keyword in node:
            yield f"{word} {node[keyword]}"


def main(root: Path) -> None:
    """Write the generated files below the root of the repository."""
    for name, schema in SCHEMAS.items():
        (root / "configs" / f"{name}.schema.json").write_text(json_schema(schema), "utf-8")
    (root / "docs" / "configuration.md").write_text(markdown(), "utf-8")


if __name__ == "__main__":
    main(Path.cwd())
