"""`sdxl-distill verify-shards` as a script."""

from __future__ import annotations

import sys

from sdxl_distill.cli import verify_shards
from sdxl_distill.cli.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(verify_shards))
