"""SDXL checkpoints and their three networks: the only importers of diffusers and transformers."""

from __future__ import annotations
