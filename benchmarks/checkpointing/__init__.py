"""What ``benchmarks/checkpoints.py`` measures: a module for each kind of claim, run by its ranks too."""
