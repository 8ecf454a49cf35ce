"""A tiny SDXL family, real photos and figures, so that the whole pipeline runs on a laptop's CPU."""
