"""Streaming: the sets of one training joined record by record, and batches read ahead."""
