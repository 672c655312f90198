"""What is known about averaging, reproduced: one script per experiment, the same on 1, 2 and 4 ranks.

Run as ``python -m benchmarks.averaging.<name>`` from the repository's root. Each has a fixed global batch, which the
ranks share; draws everything from one seed; prints a table with a row for each number of ranks; and writes the rows as
JSON lines, and a plot (``pip install ".[bench]"``), beside itself. ../results/averages.md holds the tables with date
and command; docs/guide/averaging.md says what follows from them.
"""
