"""Files below one URL: local, or on any fsspec target."""
