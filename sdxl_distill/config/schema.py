"""The two schemas that a configuration file may have."""

from __future__ import annotations

from sdxl_distill.config.builder import BuilderConfig
from sdxl_distill.config.distill import DistillConfig

__all__ = ["BuilderConfig", "DistillConfig"]
