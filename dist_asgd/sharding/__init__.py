"""One rank's part of a bucket: the layout, the placement of parameters, and the shard with its optimizer state."""
