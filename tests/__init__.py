"""Tests, in folders as the package has them; what several of them use is in ``support``."""
