"""Is a set right: what is checked of a file, a shard, a set, a catalog and a loose folder."""
