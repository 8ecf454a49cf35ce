"""Building shard sets: who builds what, and how a shard and a set are committed."""
