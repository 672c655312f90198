"""Readers of checkpoints that torch.distributed.checkpoint (DCP) wrote, which run none of the pickles in them."""
