"""Loading: what is read, verified, and only then put into live state."""
