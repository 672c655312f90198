"""Benchmarks: one script per claim of the README, run as ``python -m benchmarks.<name>`` from the repository's root.

Each prints a table with the peers' figures, ours and their ratio from the same run, and writes the same rows as
JSON lines. RESULTS.md lists the files of results/, which hold the printed tables with date and command.
"""
