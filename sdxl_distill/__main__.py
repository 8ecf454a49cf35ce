"""`python -m sdxl_distill COMMAND`, and so `accelerate launch -m sdxl_distill COMMAND`."""

from __future__ import annotations

import sys

from sdxl_distill.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
