"""The command `sdxl-distill pack-shards` as a script, for `accelerate launch tools/pack_shards.py`."""

from __future__ import annotations

import sys

from sdxl_distill.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("pack-shards"))
