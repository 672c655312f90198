"""Settings every test needs. The parent of forked ranks stays single-threaded: see ranks.py."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.cuda.is_available() then asks the driver's library, and does not initialize CUDA, which does not survive a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores of other processes'
pytest.register_assert_rewrite("tests.support.ranks", "tests.support.oracle")

import torch  # noqa: E402

torch.set_num_threads(1)

from tests.support.cheap_forks import prepare  # noqa: E402

os.register_at_fork(before=prepare)
