"""Building shard sets: who builds what, how a shard is committed, and each kind of set."""
