"""What happens in a step before and after the update: agreement, checks, clipping, waits of the forward."""
