"""Loading a checkpoint: everything needed is read and verified on all ranks before live state is changed."""
