"""Loose files: a folder of records packed into a set, and a set unpacked into one."""
