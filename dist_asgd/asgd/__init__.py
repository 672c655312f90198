"""The ASGD rule of one step: its maths, its schedule and its rounding. It knows neither ranks nor buckets."""
