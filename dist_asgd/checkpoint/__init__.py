"""Checkpoints on any fsspec target: sharded, committed at once, checksummed, read without unpickling anything."""
