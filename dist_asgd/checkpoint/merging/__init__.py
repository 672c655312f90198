"""Merging checkpoints: a weighted mean of the weights in several sources, streamed into a new checkpoint or file."""
