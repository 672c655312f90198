"""Checkpoints of sharded state on any fsspec target: whole or not there, checksummed, for any number of ranks."""
