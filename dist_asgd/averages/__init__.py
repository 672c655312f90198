"""Kinds of average, their options, and triggers that say when to start. Knows no optimizer."""
