"""What several test files use: ranks, oracles, stores, cases."""
