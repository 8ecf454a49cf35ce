"""`--config`, `--set` and `--print-config`, the same on every command that has a configuration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from sdxl_distill.cli.path_argument import path_argument
from sdxl_distill.errors import ConfigError

if TYPE_CHECKING:
    from sdxl_distill.config.section import Section

    Schema = TypeVar("Schema", bound=Section)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare the three options."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=path_argument,
        required=required,
        help="JSON file; comments and trailing commas are allowed (docs/configuration.md)",
    )
    parser.add_argument(
        "--set",
        metavar="a.b.c=value",
        action="append",
        default=[],
        dest="overrides",
        help="override one field of the file; may be given many times",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )


def config_of(arguments: argparse.Namespace, schema: type[Schema]) -> Schema | None:
    """Load the configuration; None when it was only to be printed, which is done.

    Raises:
        ConfigError: when the file is missing or wrong.
    """
    from sdxl_distill.config.loader import load_config, resolved_json

    if arguments.config is None:
        raise ConfigError(
            "--config is missing", where="command line", action="name the configuration file"
        )
    config = load_config(arguments.config, schema, arguments.overrides)
    if arguments.print_config:
        print(resolved_json(config), end="")
        return None
    return config
