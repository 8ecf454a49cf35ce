"""The student's training: optimizer, step, loop, checkpoints and what is logged."""
