"""Configuration files: their schema, their loader and the reference generated from them."""
