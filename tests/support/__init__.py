"""What tests of several folders share: makers of sets and images, processes, oracles."""
