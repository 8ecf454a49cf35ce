"""Multi-teacher distillation for SDXL over sharded, streamable caches."""
