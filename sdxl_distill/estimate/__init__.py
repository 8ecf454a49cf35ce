"""What a build or a training will cost: bytes, memory and hours."""
