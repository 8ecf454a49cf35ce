"""The on-disk format: records in tars, an index next to each, a manifest over all.

See docs/format.md.
"""
