"""The on-disk format: records in tars, an index beside each, a manifest over all.

See docs/format.md.
"""
