"""Is a set right: the checks of a record, a shard, a set, a catalog and a loose folder."""
