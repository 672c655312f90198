"""What benchmarks.soak runs: a rank that writes a diary, and what the diaries say."""
