"""`--threads`, the same on every command that reads many shards at once."""

from __future__ import annotations

import argparse

from sdxl_distill.cores import available_cores


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--threads",
        metavar="N",
        type=positive_number,
        default=available_cores(),
        help="shards that are read at once (default: %(default)s)",
    )


def number_from_zero(text: str) -> int:
    """Parse a whole number from 0; argparse explains the ValueError."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive_number(text: str) -> int:
    """Parse a whole number from 1; argparse explains the ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
