"""The real SDXL as benchmarks know it: configurations without weights, and its usual sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sdxl_distill.core.bucket import Bucket

SDXL: Final = str(Path(__file__).parents[1] / "sdxl_base")
SQUARE: Final = Bucket(1024, 1024)
NUM_TOKENS: Final = 77
