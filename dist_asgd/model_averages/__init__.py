"""Parts of ``ShardedAverages``: followed optimizers, the start of averages, buffers, state dicts, copies."""
