"""`--config`, `--set`, `--print-config`, `--rehash`, on every command that has a configuration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from sdxl_distill.errors import ConfigError
from sdxl_distill.runtime.cores import available_cores
from sdxl_distill.storage.path_text import fault_of_path


def path_argument(text: str) -> str:
    """Return the path as it was given; argparse prints the fault of a text that is not one."""
    fault = fault_of_path(text)
    if fault is not None:
        raise argparse.ArgumentTypeError(f"not a path: {fault}")
    return text


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--threads",
        metavar="N",
        type=positive_number,
        default=available_cores(),
        help="number of shards to read at once (default: %(default)s)",
    )


def number_from_zero(text: str) -> int:
    """Parse a whole number of at least 0; argparse explains the ValueError."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive_number(text: str) -> int:
    """Parse a whole number of at least 1; argparse explains the ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if TYPE_CHECKING:
    from sdxl_distill.config.section import Section

    Schema = TypeVar("Schema", bound=Section)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare the four options."""
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
        help="override one field of the file; may be repeated",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    parser.add_argument(
        "--rehash",
        action="store_true",
        help="read checkpoints that seem unchanged again, instead of trusting their remembered "
        "fingerprints",
    )


def config_of(arguments: argparse.Namespace, schema: type[Schema]) -> Schema | None:
    """Load the configuration; print it and return None with --print-config.

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
    if arguments.rehash:
        from sdxl_distill.models.fingerprint_memory import distrust

        distrust()
    return config
