"""The process that runs: its rank, cores, device, and how it is asked to stop."""
