"""Situations in which averages of weights go wrong, and how this library and others fare in them."""
