"""Saving a checkpoint: assignment of blocks to ranks, writing of one file a rank, and the commit by rank 0."""
