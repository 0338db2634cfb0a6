"""Blocks of shared memory: how they are made, named, opened and removed."""
