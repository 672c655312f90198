"""What one rank owns of a bucket: layout, placement, and the shard with its state."""
