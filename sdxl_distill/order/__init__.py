"""In which order records are read, by which rank: pure arithmetic of (seed, epoch, step)."""
