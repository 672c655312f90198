"""Saving: who writes what, the writing, and the commit."""
