"""Live state (modules, optimizers, values) as entries of a checkpoint, and back."""
