"""Pure arithmetic of the method: no files, ranks, clocks or global random state."""
