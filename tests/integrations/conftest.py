"""Tests of frameworks run in .venv, those of torchtitan in .venv/torchtitan: see launch/test.sh."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torchtitan") else ["test_torchtitan.py"]
