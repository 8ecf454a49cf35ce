"""`sdxl-distill train` as a script, for `accelerate launch`."""

from __future__ import annotations

import sys

from sdxl_distill.cli import train
from sdxl_distill.cli.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(train))
