"""The trained student in formats that other programs load."""
