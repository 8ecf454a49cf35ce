"""The optimizer of the student: one update of the parameters, and its state in checkpoints."""
