"""Tests of frameworks run in .venv, those of torchtitan and TRL in .venv/torchtitan: see launch/test.sh."""

from importlib.util import find_spec

collect_ignore = [f"test_{name}.py" for name in ("torchtitan", "trl") if not find_spec(name)]
