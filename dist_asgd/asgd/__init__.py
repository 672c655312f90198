"""The ASGD rule of one step: its maths, its schedule and its rounding. Knows no ranks and no buckets."""
