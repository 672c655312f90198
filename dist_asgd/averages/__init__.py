"""The kinds of average, their options in param groups, and triggers that start averaging."""
