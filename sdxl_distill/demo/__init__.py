"""A tiny SDXL family, real photos and figures: the whole pipeline on a laptop's CPU."""
