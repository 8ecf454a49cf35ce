"""Streaming: in which order records are read, by which rank, and how the sets are joined."""
