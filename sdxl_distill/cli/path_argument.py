"""The type of every path on a command line."""

from __future__ import annotations

import argparse

from sdxl_distill.path_text import fault_of_path


def path_argument(text: str) -> str:
    """Return the path as it was given; argparse prints what keeps a text from being one."""
    fault = fault_of_path(text)
    if fault is not None:
        raise argparse.ArgumentTypeError(f"no path: {fault}")
    return text
