"""Files: the one door through which sets and checkpoints are read and written."""
