"""The files of a checkpoint: manifest, archives of tensors, and DCP metadata."""
