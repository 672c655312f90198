"""The parts of ``ShardedAverages``: whose steps it follows, when averages begin, buffers, state dicts, copies."""
