"""Settings every test needs. The parent of forked ranks stays single-threaded: see ranks.py."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("ranks", "oracle")

import torch  # noqa: E402

torch.set_num_threads(1)
