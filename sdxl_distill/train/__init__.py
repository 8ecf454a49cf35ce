"""The student's training: step, loop, average, checkpoints and what is logged."""
