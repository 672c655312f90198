"""Checkpoints that torch.distributed.checkpoint (DCP) wrote, read without running their pickles."""
